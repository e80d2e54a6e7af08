"""Tensors of which a few entries are stored, with their places."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from mergebench.core.errors import FormatError
from mergebench.core.tensor import DTYPES, FLOATING, Array, Tensor, size_of

#: Stored entries between two places that are remembered.
_BLOCK = 1 << 12
_INDEX = ("I32", "I64")
_DIMS, _ENDLESS = 8, 1 << 62


@dataclass(frozen=True, eq=False)
class Scattered:
    """Zero but for stored entries; nothing of its full size is ever held.

    Attributes
    ----------
    shape : tuple of int
    indices : Tensor, (k,)
        Rising places in the flattened (row-major) tensor, checked by :func:`scattered`.
    values : Tensor, (k,)
    marks : int64 array
        The first index of every block of 4096.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    marks: Array = field(repr=False)

    @property
    def dtype(self) -> str:
        """Stored dtype of the values."""
        return self.values.dtype

    @property
    def stored(self) -> int:
        """Number of stored entries."""
        return size_of(self.values.shape)

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor, shape ``(stop-start,)``."""
        dtype = DTYPES[self.dtype]
        if out is None:
            entries: Array = np.zeros(stop - start, dtype)
        else:
            entries = out[: (stop - start) * dtype.itemsize].view(dtype)
            entries[:] = 0
        first = max(int(np.searchsorted(self.marks, start, "right")) - 1, 0) * _BLOCK
        last = min(int(np.searchsorted(self.marks, stop)) * _BLOCK, self.stored)
        if first < last:
            places = self.indices.read(first, last)
            low, high = (int(each) for each in np.searchsorted(places, (start, stop)))
            values = self.values.read(first + low, first + high)
            entries[places[low:high].astype(np.int64) - start] = values
        return entries


def checked_shape(where: str, shape: Any) -> tuple[int, ...]:
    """A shape that a file states.

    Raises
    ------
    FormatError
        If it is none, or of more entries than can be numbered.
    """
    fits = isinstance(shape, list | tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not fits or len(shape) > _DIMS or max((1, *shape)) >= _ENDLESS or prod(shape) >= _ENDLESS:
        raise FormatError(
            f"{where}: is no shape",
            expected=f"up to {_DIMS} whole numbers, fewer than 2^62 entries",
            got=repr(shape)[:80],
        )
    return tuple(shape)


def scattered(where: str, shape: tuple[int, ...], indices: Tensor, values: Tensor) -> Scattered:
    """The tensor of some stored entries; places are read once, in pieces, and checked.

    Parameters
    ----------
    where : str
        File and tensor, for messages.
    shape : tuple of int
    indices : Tensor, (k,)
        I32 or I64.
    values : Tensor, (k,)
        Floating-point.

    Raises
    ------
    FormatError
        For other dtypes or shapes, and for places that lie outside of the tensor, do not rise, or
        come twice.
    """
    if indices.dtype not in _INDEX or len(indices.shape) != 1:
        raise FormatError(
            f"{where}: its places are no list of whole numbers",
            expected="I32 or I64 of one dimension",
            got=f"{indices.dtype} of shape {indices.shape}",
        )
    if values.dtype not in FLOATING or values.shape != indices.shape:
        raise FormatError(
            f"{where}: its values do not go with its places",
            expected=f"floating-point numbers of shape {indices.shape}",
            got=f"{values.dtype} of shape {values.shape}",
        )
    size, marks, before = prod(shape), [], -1
    for start in range(0, indices.shape[0], _BLOCK):
        stop = min(start + _BLOCK, indices.shape[0])
        places = indices.read(start, stop).astype(np.int64)
        _check(where, places, before, size)
        marks.append(int(places[0]))
        before = int(places[-1])
    return Scattered(shape, indices, values, np.array(marks, np.int64))


def _check(where: str, places: Array, before: int, size: int) -> None:
    steps = np.diff(places, prepend=np.int64(before)) if places[0] >= 0 else places
    outside = places[(places < 0) | (places >= size)]
    if outside.size:
        raise FormatError(
            f"{where}: a place lies outside of the tensor",
            expected=f"places from 0 to {size - 1}",
            got=str(outside[0]),
            fix="download or extract it again",
        )
    if (steps <= 0).any():
        at = int(np.argmax(steps <= 0))
        what = "comes twice" if steps[at] == 0 else "stands before a smaller one"
        raise FormatError(
            f"{where}: a place {what}",
            expected="rising places, each once",
            got=str(places[at] if steps[at] == 0 else places[at] - steps[at]),
            fix="extract it again, or add up what stands at the same place",
        )
