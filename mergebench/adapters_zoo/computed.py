"""Matrices whose blocks are computed from small stored tensors when they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from mergebench.core.tensor import DTYPES, Array

#: A block of rows and columns of a matrix, float64, from slices with given ends.
Block = Callable[[slice, slice], Array]
_ROWS = 8


@dataclass(frozen=True, eq=False)
class Computed:
    """A tensor known by the blocks of its matrix.

    Attributes
    ----------
    shape : tuple of int
        As the displaced tensor is stored: (out, in) or (out, channels, *kernel) of the matrix, or
        (in, out) if ``transposed``.
    block : callable ``(rows, columns) -> Array``
        Of the matrix (out, in · ∏ kernel), in float64.
    transposed : bool, default False
        The tensor is stored input × output.
    dtype : str, default F32
        Of what is read; F64 where a stored part is.
    """

    shape: tuple[int, ...]
    block: Block
    transposed: bool = False
    dtype: str = "F32"

    @property
    def together(self) -> int:
        """How many entries are computed if one is read, from a multiple of this on."""
        count = self.shape[0] if self.shape else 1
        return max(_ROWS * (prod(self.shape) // max(count, 1)), 1)

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor, computed in float64 and rounded once."""
        count = self.shape[0] if self.shape else 1
        width = prod(self.shape) // max(count, 1)
        values = np.empty(stop - start, DTYPES[self.dtype])
        every = slice(0, width)
        # A BLAS may order its sums by the shape of the product, so blocks of rows are cut at fixed
        # places: an entry then never depends on the range that asked for it.
        first = start // width // _ROWS * _ROWS if width else count
        for row in range(first, -(-stop // width) if width else count, _ROWS):
            rows = slice(row, min(row + _ROWS, count))
            part = self.block(every, rows).T if self.transposed else self.block(rows, every)
            flat = part.reshape(-1)
            origin = row * width
            low, high = max(start, origin), min(stop, origin + flat.size)
            values[low - start : high - start] = flat[low - origin : high - origin]
        if out is None:
            return values
        place = out[: values.nbytes].view(values.dtype)
        place[:] = values
        return place
