"""Scaling down intruder dimensions: what is taken out of an update, in thin factors."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from mergebench.compute.intruders import Direction, Intruders, Side, intruders
from mergebench.core.tensor import Array

#: Stands in for the removal where something as large is to be taken away without looking: the
#: update is shrunk by as much as would be removed, or to the norm that would be left.
Control = Literal["none", "removed", "norm"]


@dataclass(frozen=True, eq=False)
class Removal:
    """What is to become of one update: ``scale · ΔW + left @ right``.

    Attributes
    ----------
    scale : float
        1, but for a control.
    left, right : float64 arrays, (n, j) and (j, m)
        ``(λ - 1) Σ σ u vᵀ`` over the directions that are scaled down, both factors with the square
        root of its singular values; j is 0 for a control.
    directions : tuple of Direction
        Those that are scaled down, or would be: intruders, largest singular value first.
    shares : tuple of float
        ``σ² / ‖W‖²`` of each.
    found : int
        How many intruders there are among the leading directions.
    removed : float
        ``‖ΔW - ΔW'‖ / ‖ΔW‖``.
    kept : float
        ``‖ΔW'‖ / ‖ΔW‖``.
    energy : float
        ``1 - ‖W'‖² / ‖W‖²``; below 0 where W grows.
    """

    scale: float
    left: Array
    right: Array
    directions: tuple[Direction, ...] = ()
    shares: tuple[float, ...] = ()
    found: int = 0
    removed: float = 0.0
    kept: float = 1.0
    energy: float = 0.0


def removal(
    base: Array,
    update: Array,
    *,
    lam: float,
    top: int | None = 1,
    k: int = 10,
    epsilon: float = 0.5,
    side: Side = "left",
    control: Control = "none",
) -> Removal:
    """How intruder dimensions of ``W = W0 + ΔW`` are scaled by λ (arXiv:2410.21228, section 5).

    ``ΔW' = ΔW + (λ - 1) Σ σ u vᵀ`` over the intruders with the largest singular values, which are
    those of W. Found as :func:`~mergebench.compute.intruders.intruders` finds them, without a
    decomposition where bounds settle what is one.

    Parameters
    ----------
    base, update : float32 or float64 arrays, (n, m)
        Every entry finite.
    lam : float
        What is kept of each: 1 leaves all as it is, 0 removes them.
    top : int or None, default 1
        How many of each matrix at most; ``None`` for all.
    k, epsilon, side
        As in :func:`~mergebench.compute.intruders.intruders`; with k = 0 all directions are looked
        at.
    control : none (default), removed or norm
        Shrink the update as a whole instead, by c = 1 - ‖ΔW - ΔW'‖ / ‖ΔW‖ (at least 0), or by
        c = ‖ΔW'‖ / ‖ΔW‖. Where there is no intruder nothing is shrunk either.
    """
    rows, columns = base.shape
    nothing = Removal(1.0, np.zeros((rows, 0)), np.zeros((0, columns)))
    length = sqrt(float(np.einsum("ij,ij->", update, update, dtype=np.float64)))
    if length == 0.0 or lam == 1.0:
        return nothing
    found = intruders(
        base, base + update, k=k or min(base.shape), epsilons=(epsilon,), side=side, triplets=True
    )
    places = [each.index for each in found.directions if each.intruder[0]]
    chosen = places[:top]
    if not chosen:
        return nothing
    assert found.triplets is not None
    S = found.triplets.S[chosen]
    root = np.sqrt(abs(1.0 - lam) * S)
    left = found.triplets.U[:, chosen] * (root if lam > 1.0 else -root)
    right = root[:, None] * found.triplets.Vt[chosen]
    removed = abs(1.0 - lam) * float(np.linalg.norm(S)) / length
    kept = _norm_with(update, left, right, length) / length
    shown = tuple(found.directions[place] for place in chosen)
    about = shown, _shares(found, shown), len(places)
    if control == "none":
        energy = (1.0 - lam * lam) * sum(about[1])
        return Removal(1.0, left, right, *about, removed, kept, energy)
    scale = max(1.0 - removed, 0.0) if control == "removed" else kept
    # ‖W‖² - ‖W0 + cΔW‖² = 2 (1 - c) ⟨W0, ΔW⟩ + (1 - c²) ‖ΔW‖².
    inner = float(np.einsum("ij,ij->", base, update, dtype=np.float64))
    lost = 2 * (1.0 - scale) * inner + (1.0 - scale * scale) * length**2
    energy = lost / found.squared
    return Removal(scale, nothing.left, nothing.right, *about, abs(1.0 - scale), scale, energy)


def _shares(found: Intruders, shown: tuple[Direction, ...]) -> tuple[float, ...]:
    return tuple(each.sigma**2 / found.squared for each in shown)


def _norm_with(update: Array, left: Array, right: Array, length: float) -> float:
    """``‖ΔW + left @ right‖`` without the sum, as ``√(‖ΔW‖² + 2⟨·,·⟩ + ‖left @ right‖²)``."""
    inner = float(np.sum((left.T @ update) * right))
    own = float(np.sum((left.T @ left) * (right @ right.T)))
    return sqrt(max(length**2 + 2 * inner + own, 0.0))
