"""What directions without any relation to the base would show."""

from __future__ import annotations

from functools import cache
from math import exp, lgamma, sqrt

import numpy as np

_REACH, _STEPS = 12.0, 4800


@cache
def expected_largest(dimension: int, vectors: int, signed: bool = False) -> float:
    """The expected largest |cos| of a random unit vector with orthonormal ones, exactly.

    The coordinates of a random unit vector are those of a Gaussian one over its length, of which
    they are independent: ``E max|g_i| / E‖g‖``.

    Parameters
    ----------
    dimension : int
        Of the space.
    vectors : int
        How many orthonormal vectors, at most ``dimension``.
    signed : bool, default False
        Of the largest cosine rather than the largest |cos|.
    """
    if dimension < 1 or vectors < 1:
        return 0.0
    length = sqrt(2) * exp(lgamma((dimension + 1) / 2) - lgamma(dimension / 2))
    return _largest_gaussian(vectors, signed) / length


def _largest_gaussian(count: int, signed: bool) -> float:
    """``E max_i |g_i|``, or ``E max_i g_i``, of so many standard Gaussians."""
    from scipy.special import ndtr

    at = np.linspace(0.0, _REACH, _STEPS + 1)
    above = ndtr(-at)
    # E x = ∫ P(x > t) dt over t > 0, less ∫ P(x < -t) dt where x can be negative.
    share = above if signed else 2 * above
    with np.errstate(divide="ignore"):
        tail = -np.expm1(count * np.log1p(-share))
    if signed:
        tail = tail - above**count
    return float(np.trapezoid(tail, at))
