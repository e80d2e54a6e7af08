"""The leading left singular vectors of one matrix beside all those of another, with bounds.

No matrix is decomposed: a handful of products settles most vectors, and bounds the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, hypot, log2, sqrt
from typing import NamedTuple

import numpy as np

from mergebench.compute.christoffel import mass_bound
from mergebench.compute.found import Found
from mergebench.compute.krylov import Ritz, lanczos, leading
from mergebench.compute.products import ROUNDING, Pair
from mergebench.core.tensor import Array

#: Vectors iterated beyond those that are asked for.
_EXTRA = 22
#: Residuals, as shares of eigenvalues, at which vectors of the base and of the tuned matrix count.
_BASE, _TUNED = 1e-5, 3e-6
#: Lanczos steps that are tried.
_STEPS = (32, 64)
#: What rounding changes in cosines with base vectors that are held in float32.
_HELD = 1e-6
#: The residual that vectors reach beside all those of the base.
_REFINED = 1e-10
#: Entries above this are scaled down first.
_LARGE = 1e6


class Alignment(NamedTuple):
    """Per vector of the tuned matrix, largest singular value first.

    Attributes
    ----------
    sigma : float64 array, (k,)
        Singular values.
    lower, upper : float64 arrays, (k,)
        What the largest |cosine| with any base vector is at least, and at most.
    block : float32 array, (min(n, m), at least k)
        Where the vectors of the tuned matrix are, in columns: left ones, or right ones where
        ``n > m``. Good to iterate from.
    """

    sigma: Array
    lower: Array
    upper: Array
    block: Array


def alignments(
    base: Array,
    tuned: Array | tuple[Array, Array],
    k: int,
    epsilons: Sequence[float],
    known: Callable[[], Array] | None = None,
) -> Alignment | None:
    """Bound ``max_i |u_iᵀ u'_j|`` closely enough to compare it with every threshold.

    Parameters
    ----------
    base : float32 array, (n, m)
        Every entry finite.
    tuned : float32 array, (n, m), or factors (n, r) and (r, m)
        Factors stand for ``base + left @ right``.
    k : int
        Leading left singular vectors of ``tuned``.
    epsilons : sequence of float
        Thresholds, in (0, 1].
    known : callable, optional
        Gives the left singular vectors of ``base``, float32, in columns. Asked where bounds do not
        settle everything: the cosines with all of them then are known, but for what the vectors of
        ``tuned`` may be off.

    Returns
    -------
    Alignment or None
        ``None`` where some vector cannot be told from some threshold: only decompositions can.
    """
    width = k + _EXTRA
    if min(base.shape) < 2 * width:
        return None
    peak = max(float(np.abs(each).max()) for each in (base, *_parts(tuned)))
    if peak > _LARGE:
        # Products of four entries must stay within float32.
        share = np.float32(2.0 ** -ceil(log2(peak)))
        same = alignments(base * share, _scaled(tuned, share), k, epsilons, known)
        return None if same is None else same._replace(sigma=same.sigma / float(share))
    pair = Pair(base, tuned)
    size = min(base.shape) if pair.tall else base.shape[0]
    origin = leading(pair.base, _random(size, width), k, rounds=4, tolerance=_BASE)
    start = np.hstack([origin.vectors, _random(size, 2)])
    moved = leading(pair.tuned, start, k, tolerance=_TUNED)
    if not origin.values[0] or moved.values[k - 1] <= ROUNDING * moved.values[0]:
        return None
    slack = _angles(moved)[:k]
    if slack.max() > 0.1:
        return None
    found = Found.of(origin, _BASE, stretched=pair.tall)
    along, rest = pair.beside(found.ritz, moved.vectors[:, :k], moved.values[:k])
    least, most = found.between(along)
    lower = np.maximum(least - slack, 0.0)
    # Squares of cosines add up to one at most: none is above one that has more than half.
    length = np.sqrt(np.maximum(1 - (along**2).sum(axis=0), 0.0))
    upper = np.where(lower > sqrt(0.5), most, np.hypot(most, length)) + slack
    left = np.flatnonzero(_undecided(lower, upper, epsilons))
    bulk = _Bulk(pair, found) if len(left) else None
    for steps in _STEPS:
        if bulk is None or not len(left):
            break
        goals = [min(each for each in epsilons if each > lower[place]) for place in left]
        bounds = bulk.bounds(rest[:, left], along[:, left], steps, np.array(goals) - slack[left])
        upper[left] = np.minimum(upper[left], bounds + slack[left])
        left = left[_undecided(lower[left], upper[left], epsilons)]
    if len(left) and known is not None:
        lower, upper = _beside_all(base, tuned, moved, k, known())
        left = np.flatnonzero(_undecided(lower, upper, epsilons))
    if len(left):
        return None
    return Alignment(np.sqrt(moved.values[:k]), lower, np.minimum(upper, 1.0), moved.vectors)


def _parts(tuned: Array | tuple[Array, Array]) -> tuple[Array, ...]:
    return tuned if isinstance(tuned, tuple) else (tuned,)


def _scaled(tuned: Array | tuple[Array, Array], share: np.float32) -> Array | tuple[Array, Array]:
    return (tuned[0] * share, tuned[1]) if isinstance(tuned, tuple) else tuned * share


def _random(size: int, count: int) -> Array:
    # Any start will do; the same one gives the same digits every time.
    return np.random.default_rng(0).standard_normal((size, count), np.float32)


def _angles(found: Ritz, rounding: float = ROUNDING) -> Array:
    """Bounds of the sines between Ritz vectors and eigenvectors (Davis and Kahan)."""
    values = found.values
    gaps = np.abs(values[:, None] - values)
    np.fill_diagonal(gaps, np.inf)
    errors = found.residuals + rounding * values[0]
    return np.asarray(np.minimum(sqrt(2) * errors / np.maximum(gaps.min(axis=1), 1e-300), 1.0))


def _undecided(lower: Array, upper: Array, epsilons: Sequence[float]) -> Array:
    return np.asarray(np.any([(lower < each) & (each <= upper) for each in epsilons], axis=0))


def _beside_all(
    base: Array, tuned: Array | tuple[Array, Array], moved: Ritz, k: int, known: Array
) -> tuple[Array, Array]:
    """The largest |cosine| of each vector with any of the base, at least and at most.

    The vectors are iterated further, in float64.
    """
    dense = base + tuned[0] @ tuned[1] if isinstance(tuned, tuple) else tuned
    wide = np.asarray(dense.T if base.shape[0] > base.shape[1] else dense, np.float64)
    start = np.asarray(moved.vectors, np.float64)
    found = leading(lambda part: wide @ (wide.T @ part), start, k, tolerance=_REFINED)
    slack = _angles(found, float(np.finfo(np.float64).eps) * len(start))[:k]
    vectors = found.vectors[:, :k]
    if base.shape[0] > base.shape[1]:
        # u = W v / σ: what v has of other vectors grows by the ratio of singular values.
        ratio = np.sqrt(found.values[0] / found.values[:k])
        vectors, slack = wide.T @ vectors / np.sqrt(found.values[:k]), slack * ratio
    cosines = np.abs(known.T @ vectors).max(axis=0, initial=0.0)
    errors = slack + _HELD
    return np.maximum(cosines - errors, 0.0), np.minimum(cosines + errors, 1.0)


class _Bulk:
    """What is left of the base without its leading vectors."""

    def __init__(self, pair: Pair, found: Found) -> None:
        self.found, self.tall = found, pair.tall
        self.apply = pair.deflated(found.ritz)
        self.low = pair.smallest(found.ritz) if pair.tall else 0.0
        self.noise = float(np.linalg.norm(found.ritz.residuals)) + pair.noise(found.ritz)

    def bounds(self, rest: Array, along: Array, steps: int, goals: Array) -> Array:
        """Bounds of the |cosine| with every base vector.

        Parameters
        ----------
        rest : float32 array, (size, t)
            What lies outside of the found vectors.
        along : float64 array, (b, t)
            The cosines with these.
        steps : int
            Lanczos steps.
        goals : array, (t,)
            Bounds below these are good enough.
        """
        if self.tall and self.low <= self.noise:
            return np.ones(len(goals))
        lengths = np.linalg.norm(rest.astype(np.float64), axis=0)
        units = (rest / np.maximum(lengths, 1e-30)).astype(np.float32)
        alpha, beta = lanczos(self.apply, units, steps)
        slack = self.noise + ROUNDING * float(alpha.max() + 2 * beta.max())
        norms = self.found.norms(along)
        bounds = []
        for place, goal in enumerate(goals):
            weight = self._weight(float(lengths[place]))

            def within(
                window: tuple[float, float | None],
                own: float,
                place: int = place,
                reach: float = float(goal),
            ) -> float:
                bound = mass_bound(
                    alpha[place],
                    beta[place],
                    low=max(window[0], self.low),
                    high=window[1],
                    slack=slack,
                    weight=weight,  # noqa: B023
                    target=sqrt(max(reach**2 - own**2, 0.0)) * 0.999,
                )
                return hypot(bound, own)

            parts = [within((self.low, None), float(norms[-1, place]))]
            for group, norm in zip(self.found.groups, norms[:, place], strict=False):
                if norm >= goal:
                    parts.append(1.0)
                elif norm > norms[-1, place]:
                    parts.append(within(self.found.window(group), float(norm)))
            bounds.append(max(parts))
        return np.array(bounds)

    def _weight(self, length: float) -> Callable[[Array], Array]:
        if not self.tall:
            return lambda values: np.full_like(values, length)
        # The start was multiplied by the transposed matrix: components carry singular values.
        return lambda values: np.asarray(length / np.sqrt(np.maximum(values, self.low)))
