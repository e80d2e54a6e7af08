"""Leading eigenvectors that have converged, and what may be along the true ones."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np

from mergebench.compute.krylov import Ritz
from mergebench.compute.products import ROUNDING
from mergebench.core.tensor import Array

#: Eigenvalues this many errors apart are told apart.
_APART = 300


class Found(NamedTuple):
    """Converged pairs in groups.

    Attributes
    ----------
    ritz : Ritz
    errors : array, (b,)
        What the vectors may be off, times the distance of their eigenvalues from others.
    groups : tuple of arrays
        Places of vectors whose eigenvalues are too near to be told apart: the true ones may be any
        rotation of them.
    """

    ritz: Ritz
    errors: Array
    groups: tuple[Array, ...]

    @classmethod
    def of(cls, origin: Ritz, tolerance: float, *, stretched: bool) -> Found:
        """Those of the pairs whose residual is at most ``tolerance`` times their value.

        ``stretched`` is for right singular vectors that stand for left ones: their errors grow
        with the ratio of singular values.
        """
        ritz = origin.take(origin.residuals <= tolerance * origin.values)
        errors = ritz.residuals + ROUNDING * float(origin.values[0])
        if stretched:
            errors = errors * np.sqrt(origin.values[0] / ritz.values)
        apart = -np.diff(ritz.values) > _APART * (errors[1:] + errors[:-1])
        places = np.arange(len(ritz.values))
        groups = np.split(places, np.flatnonzero(apart) + 1) if len(places) else []
        return cls(ritz, errors, tuple(groups))

    def window(self, group: Array) -> tuple[float, float]:
        """Where the eigenvalues of a group, and whatever might hide beside it, lie."""
        values, error = self.ritz.values[group], _APART * float(self.errors[group].max())
        return float(values.min()) - error, float(values.max()) + error

    def norms(self, along: Array) -> Array:
        """What of some vectors may lie along a single eigenvector, through the found ones.

        Parameters
        ----------
        along : float64 array, (b, t)
            Cosines of the vectors with the found ones.

        Returns
        -------
        array, (groups + 1, t)
            For an eigenvector in the window of each group, and last for one in none.
        """
        rows = []
        for group in self.groups:
            low, high = self.window(group)
            values = np.delete(self.ritz.values, group)
            distance = np.minimum(abs(values - low), abs(values - high))
            share = np.delete(self.errors, group) / np.maximum(distance, self.errors.max())
            leak = np.linalg.norm(np.delete(along, group, axis=0) * share[:, None], axis=0)
            rows.append(np.linalg.norm(along[group], axis=0) + leak)
        rows.append(np.linalg.norm(along, axis=0) / _APART)
        return np.array(rows)

    def between(self, along: Array) -> tuple[Array, Array]:
        """The least and the most that the largest |cosine| with one of these can be."""
        lower = [np.zeros(along.shape[1])]
        for group in self.groups:
            own = np.linalg.norm(along[group], axis=0)
            lower.append(own / sqrt(len(group)) - sqrt(2) / _APART)
        return np.max(lower, axis=0), self.norms(along).max(axis=0)
