"""How much of a vector can lie along a single eigenvector, seen from a few Lanczos steps.

With orthonormal Lanczos polynomials p_j of a unit vector r, its component along an eigenvector of
eigenvalue λ is at most ``1 / sqrt(Σ_j p_j(λ)²)``: the square is the Christoffel function of the
spectral measure of r. Points alone would leave gaps between them, so that every bound here holds
for a cell around its point, and allows for rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mergebench.core.tensor import Array

_HUGE, _TINY = 1e100, 1e-40


def mass_bound(
    alpha: Array,
    beta: Array,
    *,
    low: float,
    high: float | None = None,
    slack: float,
    weight: Callable[[Array], Array],
    target: float,
    cells: int = 256,
    levels: int = 6,
) -> float:
    """A bound of ``weight(λ) · |component along an eigenvector of eigenvalue λ|`` over all λ.

    An eigenvector has coordinates z in the Lanczos basis, with ``‖z‖ <= 1`` and
    ``‖T(λ) z‖ <= slack``, where T(λ) has the p rows of ``λ - J`` and one column more. In a cell of
    half-width h around μ then ``‖T(μ) z‖ <= h + slack``; T(μ) has a null vector n, and so
    ``|z_1| <= |n_1| + (h + slack) / σ`` with σ the least singular value that is not zero. That is
    of no use near a node that has converged, where σ vanishes: there the coordinate along the
    node's own vector is left free, and all others are bounded.

    Parameters
    ----------
    alpha, beta : float64 arrays, (p,)
        A Lanczos recurrence. One that ended early, with zeros in ``beta``, bounds nothing.
    low, high : float
        Where eigenvalues lie; everywhere above ``low`` by default.
    slack : float
        What rounding and deflation change at most, in units of the operator.
    weight : callable
        A function of λ that does not rise.
    target : float
        Cells are split until the bound falls below it, or cannot.
    cells, levels : int
        Cells to begin with, and how often they are split into four.

    Returns
    -------
    float
    """
    if not beta.all():
        return float(weight(np.array([low]))[0])
    inner = np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
    nodes, vectors = np.linalg.eigh(inner)
    firsts, lasts = vectors[0], beta[-1] * vectors[-1]
    # Past the last node every polynomial grows, and so does their sum: the bound falls.
    if high is None:
        high = max(float(nodes[-1]), low) + float(beta[-1]) + 4 * slack
    edges = low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, cells + 1))) / 2
    left, right = edges[:-1], edges[1:]
    best = 0.0
    for level in range(levels + 1):
        middle, half = (left + right) / 2, (right - left) / 2
        first = _null(alpha, beta, middle)
        near, freed = _cell(nodes, firsts, lasts, middle, half + slack)
        bounds = np.minimum(np.minimum(first + near, freed), 1.0) * weight(left)
        # Splitting helps neither cells that are low enough nor those whose middle is too high.
        again = (bounds > target) & (first * weight(right) <= target)
        best = max(best, float(bounds[~again].max(initial=0.0)))
        if level == levels or not again.any() or best > target:
            return max(best, float(bounds.max()))
        corners = np.linspace(left[again], right[again], 5, axis=1)
        left, right = corners[:, :-1].ravel(), corners[:, 1:].ravel()
    raise AssertionError


def _null(alpha: Array, beta: Array, points: Array) -> Array:
    """The first entry of the unit null vector of T: 1 / sqrt(Σ p_j²), j = 0 … p."""
    before, now = np.zeros_like(points), np.ones_like(points)
    first, total = np.ones_like(points), np.ones_like(points)
    step = 0.0
    for centre, after in zip(alpha, beta, strict=True):
        now, before = ((points - centre) * now - step * before) / after, now
        step = after
        total = total + now * now
        scale = np.where(total > _HUGE, _TINY, 1.0)
        now, before, first = now * scale, before * scale, first * scale
        total = total * scale * scale
    return first / np.sqrt(total)


def _cell(
    nodes: Array, firsts: Array, lasts: Array, points: Array, reach: Array
) -> tuple[Array, Array]:
    """What may come on top of n_1 in each cell, and a bound that leaves the nearest node free.

    In the eigenbasis of J, with g the coordinates of z there and η its last one,
    ``(μ - θ_i) g_i = β s_i η + ε_i`` and ``‖ε‖ <= reach``. ``T Tᵀ`` is diagonal plus rank one, and
    its secular equation bounds its least eigenvalue from below.
    """
    away = points[:, None] - nodes
    places = np.arange(len(points)), np.abs(away).argmin(axis=1)
    nearest = away[places] ** 2
    away[places] = np.inf
    second = np.abs(away).min(axis=1)
    share = lasts / away
    others = (share**2).sum(axis=1)
    lowest = np.minimum(second**2 / 2, nearest + lasts[places[1]] ** 2 / (1 + 2 * others))
    near = reach / np.sqrt(np.maximum(lowest, np.finfo(np.float64).tiny))
    along = (share * firsts).sum(axis=1)
    free = np.sqrt(firsts[places[1]] ** 2 + along**2 / (1 + others))
    rest = reach / np.maximum(second, np.finfo(np.float64).tiny)
    return near, free * (1 + rest) + rest
