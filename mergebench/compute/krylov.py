"""Leading eigenvectors and Lanczos coefficients of symmetric operators, without decompositions.

Everything large is a product with a block of vectors, which runs at the speed of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mergebench.core.tensor import Array

#: A positive semi-definite operator on blocks of columns, (n, b) to (n, b).
Apply = Callable[[Array], Array]


class Ritz(NamedTuple):
    """Approximate eigenpairs, largest first.

    Attributes
    ----------
    values : float64 array, (b,)
    vectors : array, (n, b), orthonormal
    residuals : float64 array, (b,)
        ``‖A x - θ x‖`` of each.
    """

    values: Array
    vectors: Array
    residuals: Array

    def take(self, chosen: Array) -> Ritz:
        """Some of the pairs."""
        return Ritz(self.values[chosen], self.vectors[:, chosen], self.residuals[chosen])


class Recurrence(NamedTuple):
    """Lanczos coefficients of several starting vectors.

    Attributes
    ----------
    alpha, beta : float64 arrays, (t, p)
        Diagonal, and what lies beside it; ``beta[:, p - 1]`` leads to vector p + 1.
    """

    alpha: Array
    beta: Array


def leading(
    apply: Apply,
    start: Array,
    count: int,
    *,
    tolerance: float,
    depth: int = 3,
    rounds: int = 8,
) -> Ritz:
    """The leading eigenpairs by block Krylov iteration with restarts (arXiv:1504.05477).

    Parameters
    ----------
    apply : Apply
    start : array, (n, b)
        The nearer to the leading eigenvectors, the better.
    count : int
        Pairs that must converge, at most b.
    tolerance : float
        Residual, as a share of its own value, at which a pair has converged.
    depth : int, default 3
        Products between restarts.
    rounds : int, default 8
        Restarts at most; what has not converged then is told by its residual.

    Returns
    -------
    Ritz
        b pairs.
    """
    size, width = start.shape
    block = np.linalg.qr(start)[0]
    image = apply(block)
    found = Ritz(np.zeros(width), block, np.full(width, np.inf))
    for _ in range(rounds):
        blocks, images = [block], [image]
        for _ in range(min(depth, size // width - 1)):
            blocks.append(_orthonormal(images[-1], blocks))
            images.append(apply(blocks[-1]))
        basis, moved = np.hstack(blocks), np.hstack(images)
        small = (basis.T @ moved).astype(np.float64)
        values, vectors = np.linalg.eigh((small + small.T) / 2)
        values, mixing = values[::-1][:width], vectors[:, ::-1][:, :width].astype(basis.dtype)
        block, image = basis @ mixing, moved @ mixing
        rest = image.astype(np.float64) - block.astype(np.float64) * values
        found = Ritz(values, block, np.linalg.norm(rest, axis=0))
        if np.all(found.residuals[:count] <= tolerance * values[:count]):
            break
    return found


def _orthonormal(block: Array, before: list[Array]) -> Array:
    basis = np.hstack(before)
    # Twice is enough (Giraud et al. 2005), also where a block lies almost in what came before.
    for _ in range(2):
        block = np.linalg.qr(block - basis @ (basis.T @ block))[0]
    return block


def lanczos(apply: Apply, starts: Array, steps: int) -> Recurrence:
    """Lanczos recurrences of several vectors side by side, with full reorthogonalisation.

    Parameters
    ----------
    apply : Apply
    starts : array, (n, t)
        Unit columns.
    steps : int
        Products, p. A recurrence that ends earlier has zeros in ``beta`` from there on.
    """
    size, count = starts.shape
    vectors = np.zeros((count, steps + 1, size), starts.dtype)
    vectors[:, 0] = starts.T
    alpha, beta = np.zeros((count, steps)), np.zeros((count, steps))
    for step in range(steps):
        own = vectors[:, : step + 1]
        rest = np.ascontiguousarray(apply(np.ascontiguousarray(vectors[:, step].T)).T)
        long = np.linalg.norm(rest.astype(np.float64), axis=1)
        for turn in range(2):
            along = np.matmul(own, rest[:, :, None])
            alpha[:, step] += along[:, step, 0]
            rest = rest - np.matmul(along.transpose(0, 2, 1), own)[:, 0]
            if turn == 0:
                continue
        norms = np.linalg.norm(rest.astype(np.float64), axis=1)
        ended = norms <= 64 * np.finfo(starts.dtype).eps * long
        beta[:, step] = np.where(ended, 0.0, norms)
        vectors[:, step + 1] = rest / np.where(ended, np.inf, norms)[:, None]
    return Recurrence(alpha, beta)
