"""Tensors whose rows are those of another tensor, in another order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np

from mergebench.core.extents import Extent, extents
from mergebench.core.tensor import DTYPES, Array, Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of ``own`` where ``index`` names one, and of ``fallback`` where it is -1.

    Attributes
    ----------
    own : Tensor
        Of any number of rows.
    index : array of int64, one per row of the result
    fallback : Tensor
        Of the shape of the result.
    stored : str, default ""
        Dtype of the result, if it is to be rounded to one.
    """

    own: Tensor
    index: Array
    fallback: Tensor
    stored: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """As ``own``, with the rows of ``index``."""
        return (len(self.index), *self.own.shape[1:])

    @property
    def dtype(self) -> str:
        """As asked; else that of both sources; F32, or F64 if one is, where they differ."""
        if self.stored:
            return self.stored
        both = {self.own.dtype, self.fallback.dtype}
        return both.pop() if len(both) == 1 else "F64" if "F64" in both else "F32"

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor."""
        width = prod(self.shape[1:])
        values = np.empty(stop - start, DTYPES[self.dtype])
        for row, count, source in _runs(self.index, start // width, -(-stop // width)):
            low, high = max(start, row * width), min(stop, (row + count) * width)
            tensor = self.fallback if source < 0 else self.own
            shift = 0 if source < 0 else (source - row) * width
            part = tensor.read(low + shift, high + shift)
            with np.errstate(over="ignore", invalid="ignore"):
                values[low - start : high - start] = part.astype(values.dtype)
        return _placed(values, out)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Where all entries lie; nothing where some are asked for, whose rows may be anywhere."""
        if (start, stop) == (0, prod(self.shape)):
            for tensor in (self.own, self.fallback):
                yield from extents(tensor, 0, prod(tensor.shape))


@dataclass(frozen=True, eq=False)
class MeanRows:
    """The mean, over those that have it, of one row of several tensors; zeros where none has it.

    Attributes
    ----------
    tensors : sequence of Tensor
    indexes : sequence of arrays of int64
        For each tensor its row of every row of the result, or -1.
    dtype : str
        Of the result, rounded once from float64.
    """

    tensors: Sequence[Tensor]
    indexes: Sequence[Array]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As the tensors, with the rows of the indexes."""
        return (len(self.indexes[0]), *self.tensors[0].shape[1:])

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened mean."""
        width = prod(self.shape[1:])
        first, last = start // width, -(-stop // width)
        total = np.zeros((last - first, width))
        count = np.zeros((last - first, 1))
        for tensor, index in zip(self.tensors, self.indexes, strict=True):
            for row, many, source in _runs(index, first, last):
                if source >= 0:
                    part = tensor.read(source * width, (source + many) * width)
                    total[row - first : row - first + many] += part.reshape(many, width)
                    count[row - first : row - first + many] += 1
        total /= np.maximum(count, 1)
        flat = total.reshape(-1)[start - first * width : stop - first * width]
        # What is not finite, or does not fit, is found by whoever merges it.
        with np.errstate(over="ignore", invalid="ignore"):
            return _placed(flat.astype(DTYPES[self.dtype]), out)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Where all entries lie; nothing where some are asked for, whose rows may be anywhere."""
        if (start, stop) == (0, prod(self.shape)):
            for tensor in self.tensors:
                yield from extents(tensor, 0, prod(tensor.shape))


def _runs(index: Array, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """``(first row, rows, first source row or -1)`` of stretches that lie together."""
    part = index[first:last]
    if not len(part):
        return
    same = np.where(part[1:] < 0, part[:-1] < 0, (part[1:] == part[:-1] + 1) & (part[:-1] >= 0))
    cuts = [0, *(np.flatnonzero(~same) + 1).tolist(), len(part)]
    for begin, end in pairwise(cuts):
        yield first + begin, end - begin, int(part[begin])


def _placed(values: Array, out: Array | None) -> Array:
    if out is None:
        return values
    target = out[: values.nbytes].view(values.dtype)
    target[:] = values
    return target
