"""What task vectors have to do with each other, from their singular triplets."""

from __future__ import annotations

from math import sqrt

import numpy as np

from mergebench.compute.decomposition import Decomposition
from mergebench.core.tensor import Array
from mergebench.spectral.measures import rank_for


def leading(found: Decomposition, share: float) -> int:
    """The fewest directions that hold a share of the energy; all that count for a share of 1."""
    return found.rank if share >= 1 else rank_for(found.S, share)


def alignment_ratio(task: Decomposition, merge: Decomposition, residual: float) -> Array:
    """Iso's subspace alignment ratio (arXiv:2502.04959), and the dimension used.

    The smallest k at which the leading k left vectors of the merge leave at most ``residual`` of
    its norm; ``‖U_k U_kᵀ Δ_t‖ / ‖Δ_t‖``.

    Returns
    -------
    array, (2,)
        Ratio (NaN where one is zero) and k.
    """
    total = float(np.linalg.norm(task.S))
    if merge.rank == 0 or total == 0:
        return np.array([np.nan, 0])
    squares = (merge.S / merge.S[0]) ** 2
    # From the smallest up, so that little ones are not lost beside large ones.
    left = np.append(np.cumsum(squares[::-1])[::-1], 0.0) / squares.sum()
    count = int(np.argmax(left <= residual**2))
    inside = (merge.U[:, :count].T @ task.U) * task.S[None, :]
    return np.array([min(float(np.linalg.norm(inside)) / total, 1.0), count])


def interference(parts: list[Decomposition], kept: int) -> tuple[float, float]:
    """TSV's singular task interference: ``Σ |(UᵀU - I) Σ (VᵀV - I)|`` (arXiv:2412.00081).

    Parameters
    ----------
    parts : list of Decomposition, one for each task
    kept : int
        Leading triplets of each.

    Returns
    -------
    tuple of two floats
        The sum, and the sum over Σσ of the triplets that were kept (0 where there are none).
    """
    cut = [min(kept, part.rank) for part in parts]
    U = np.concatenate([p.U[:, :c] for p, c in zip(parts, cut, strict=True)], axis=1)
    S = np.concatenate([p.S[:c] for p, c in zip(parts, cut, strict=True)])
    V = np.concatenate([p.Vt[:c] for p, c in zip(parts, cut, strict=True)], axis=0)
    if S.size == 0:
        return 0.0, 0.0
    left, right = _overlaps(U.T @ U, cut), _overlaps(V @ V.T, cut)
    found = float(np.abs((left * S[None, :]) @ right).sum())
    return found, found / float(S.sum())


def _overlaps(gram: Array, counts: list[int]) -> Array:
    """The Gram matrix less the identity; vectors of one task are orthonormal, whatever rounding."""
    out = gram.astype(np.float64)
    start = 0
    for count in counts:
        out[start : start + count, start : start + count] = 0.0
        start += count
    return out


def random_overlap(dimension: int, one: int, other: int) -> float:
    """``‖QᵢᵀQⱼ‖ / √min`` that random subspaces would have, in the root mean square."""
    return sqrt(max(one, other) / dimension) if dimension and min(one, other) else 0.0
