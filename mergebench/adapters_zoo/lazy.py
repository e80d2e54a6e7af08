"""Tensors computed from stored ones when they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mergebench.core.tensor import DTYPES, Array, Tensor


@dataclass(frozen=True, eq=False)
class Scaled:
    """``scale · source``, computed in float64 and rounded once.

    Attributes
    ----------
    source : Tensor
        Any shape, floating-point.
    scale : float
    """

    source: Tensor
    scale: float

    @property
    def dtype(self) -> str:
        """``F32``, or ``F64`` for a source stored so."""
        return "F64" if self.source.dtype == "F64" else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the source."""
        return self.source.shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened product, shape ``(stop-start,)``."""
        return _rounded(self.source.read(start, stop).astype(np.float64) * self.scale, self, out)


@dataclass(frozen=True, eq=False)
class Mapped:
    """A function of the entries of ``source``, computed in float64 and rounded once.

    Attributes
    ----------
    source : Tensor
        Any shape, floating-point.
    function : callable ``(values, place) -> values``
        Of float64 entries and the slice of the flattened tensor that they are.
    """

    source: Tensor
    function: Callable[[Array, slice], Array]

    @property
    def dtype(self) -> str:
        """``F32``, or ``F64`` for a source stored so."""
        return "F64" if self.source.dtype == "F64" else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the source."""
        return self.source.shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened result, shape ``(stop-start,)``."""
        values = self.source.read(start, stop).astype(np.float64)
        return _rounded(self.function(values, slice(start, stop)), self, out)


@dataclass(frozen=True, eq=False)
class Reshaped:
    """A tensor under another shape of as many entries."""

    source: Tensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """That of the source."""
        return self.source.dtype

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened source."""
        return self.source.read(start, stop, out)


@dataclass(frozen=True, eq=False)
class WithRows:
    """A matrix of which some rows are others.

    Attributes
    ----------
    source : Tensor, (rows, columns)
    rows : Tensor, (n, columns)
    places : tuple of n int
        Where each of them belongs; no place twice.
    """

    source: Tensor
    rows: Tensor
    places: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Where the two differ F32, or F64 if one is."""
        if self.source.dtype == self.rows.dtype:
            return self.source.dtype
        return "F64" if "F64" in (self.source.dtype, self.rows.dtype) else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the source."""
        return self.source.shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened matrix, shape ``(stop-start,)``."""
        width = self.shape[1]
        values = self.source.read(start, stop).astype(DTYPES[self.dtype])
        for row, place in enumerate(self.places):
            low, high = max(start, place * width), min(stop, (place + 1) * width)
            if low < high:
                shift = (row - place) * width
                values[low - start : high - start] = self.rows.read(low + shift, high + shift)
        return _placed(values, out)


def _rounded(exact: Array, tensor: Tensor, out: Array | None) -> Array:
    return _placed(exact.astype(DTYPES[tensor.dtype]), out)


def _placed(values: Array, out: Array | None) -> Array:
    if out is None:
        return values
    place = out[: values.nbytes].view(values.dtype)
    place[:] = values
    return place
