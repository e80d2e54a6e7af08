"""Tensors computed from stored ones when they are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergebench.core.tensor import Array, Tensor


@dataclass(frozen=True, eq=False)
class Scaled:
    """``scale · source``, as float64, so that the product is rounded only where it is used.

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
        """Always ``F64``."""
        return "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the source."""
        return self.source.shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened product, shape ``(stop-start,)``, float64."""
        values = self.source.read(start, stop).astype(np.float64) * self.scale
        if out is None:
            return values
        place = out[: values.nbytes].view(np.float64)
        place[:] = values
        return place
