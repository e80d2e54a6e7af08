"""Products with the Gram matrices of a base and of what it was tuned to."""

from __future__ import annotations

from math import sqrt

import numpy as np

from mergebench.compute.krylov import Apply, Ritz
from mergebench.core.tensor import Array

#: Relative rounding errors of float32 products: about ten times what random matrices show.
ROUNDING = 32.0 * float(np.finfo(np.float32).eps)
#: From this ratio of sides on, forming a Gram matrix pays.
_LONG = 2.0


class Pair:
    """``A Aᵀ`` of both matrices; ``Aᵀ A``, of their right vectors, where that is smaller.

    Parameters
    ----------
    base : float32 array, (n, m)
    tuned : float32 array, (n, m), or factors (n, r) and (r, m) of what was added to ``base``

    Attributes
    ----------
    tall : bool
        Whether right vectors stand for left ones: ``n > m``.
    """

    def __init__(self, base: Array, tuned: Array | tuple[Array, Array]) -> None:
        rows, columns = base.shape
        self.tall = rows > columns
        # Seen from here every matrix is wide, and its left vectors are sought.
        self._base = base.T if self.tall else base
        self._gram = None
        if self.tall or columns >= _LONG * rows:
            self._gram = self._base @ self._base.T
        self._factors: tuple[Array, Array] | None = None
        self._dense: Array | None = None
        if isinstance(tuned, tuple):
            left, right = tuned
            self._factors = (right.T, left.T) if self.tall else (left, right)
            self._across = self._base @ self._factors[1].T
            self._square = self._factors[1] @ self._factors[1].T
        else:
            self._dense = tuned.T if self.tall else tuned

    def base(self, block: Array) -> Array:
        """The base's Gram matrix times a block."""
        if self._gram is not None:
            return np.asarray(self._gram @ block)
        return np.asarray(self._base @ (self._base.T @ block))

    def tuned(self, block: Array) -> Array:
        """The tuned matrix's Gram matrix times a block."""
        if self._dense is not None:
            return np.asarray(self._dense @ (self._dense.T @ block))
        assert self._factors is not None
        left = self._factors[0]
        inner = left.T @ block
        own = self._across @ inner + left @ (self._across.T @ block + self._square @ inner)
        return np.asarray(self.base(block) + own)

    def beside(self, found: Ritz, vectors: Array, values: Array) -> tuple[Array, Array]:
        """Cosines of tuned left vectors with found base vectors, and what else there is of them.

        Parameters
        ----------
        found : Ritz
            Of the base.
        vectors, values : arrays, (size, k) and (k,)
            Of the tuned matrix.

        Returns
        -------
        along : float64 array, (b, k)
        rest : float32 array, (size, k)
            Orthogonal to the found vectors; multiplied by ``baseᵀ`` where :attr:`tall`.
        """
        if self.tall:
            # u = W v / σ, and baseᵀ u is what base vectors of the right side see of it.
            image = self._across_base(vectors) / np.sqrt(values).astype(np.float32)
        else:
            image = vectors
        inner = found.vectors.T @ image
        rest = image - found.vectors @ inner
        along = inner.astype(np.float64)
        return (along / np.sqrt(found.values)[:, None] if self.tall else along), rest

    def _across_base(self, vectors: Array) -> Array:
        if self._dense is not None:
            return np.asarray(self._base @ (self._dense.T @ vectors))
        assert self._factors is not None
        return np.asarray(self.base(vectors) + self._across @ (self._factors[0].T @ vectors))

    def deflated(self, found: Ritz) -> Apply:
        """The base's Gram matrix without the found vectors."""
        vectors = np.ascontiguousarray(found.vectors)
        if self._gram is not None:
            scaled = vectors * found.values.astype(np.float32)
            gram = self._gram - scaled @ vectors.T
            return lambda block: np.asarray(gram @ block)
        # Taken out of the matrix itself, large singular values leave no rounding behind.
        rest = self._base - vectors @ (vectors.T @ self._base)
        return lambda block: np.asarray(rest @ (rest.T @ block))

    def noise(self, found: Ritz) -> float:
        """What rounding may change in :meth:`deflated`, beyond the rounding of its own products."""
        if not len(found.values):
            return 0.0
        top, last = float(found.values[0]), float(found.values[-1])
        return ROUNDING * (top if self._gram is not None else sqrt(top * last))

    def smallest(self, found: Ritz) -> float:
        """A lower bound of the base's least eigenvalue, or 0 if it may be singular."""
        assert self._gram is not None
        gram = self._gram
        mean = float(np.trace(gram)) / len(gram)
        allowance = ROUNDING * max([mean, *map(float, found.values[:1])])
        for share in (0.1, 0.01):
            shifted = gram.copy()
            shifted.flat[:: len(gram) + 1] -= np.float32(share * mean)
            try:
                np.linalg.cholesky(shifted)
            except np.linalg.LinAlgError:
                continue
            return max(share * mean - allowance, 0.0)
        return 0.0
