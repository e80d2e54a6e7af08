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


def _rounded(exact: Array, tensor: Tensor, out: Array | None) -> Array:
    values: Array = exact.astype(DTYPES[tensor.dtype])
    if out is None:
        return values
    place = out[: values.nbytes].view(values.dtype)
    place[:] = values
    return place
