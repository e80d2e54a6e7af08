"""The Fréchet (Karcher) mean of directions, with the mean length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Interval

from mergebench.compute.gram import combined, gram
from mergebench.compute.namespace import namespace
from mergebench.compute.sphere import Directions
from mergebench.core.errors import ParameterError
from mergebench.merge.at import At, Stack, Statistic
from mergebench.merge.kernels.stages import Stages, combination
from mergebench.merge.op import op


def _check(weights: Sequence[float], max_iter: int, tol: float) -> None:
    if sum(weights) <= 0 or min(weights) < 0:
        raise ParameterError(
            "frechet_mean: weights",
            got=str(list(weights)),
            expected="none below zero and one above it",
        )


def _shares(at: At, max_iter: int, tol: float) -> tuple[Any, int]:
    """Coefficients of the models, (n,), and the heaviest."""
    xp = namespace(at.value)
    weights = xp.asarray(at.weights, dtype=xp.float64, device=at.value.device) / sum(at.weights)
    found = Directions.of(at.value, weights, normalize=True)
    mean, directed = found.start()
    active = directed
    for _ in range(max_iter):
        there, length = found.moved(mean, found.step(mean, "log"))
        active = active & (length >= tol)
        mean = xp.where(active, there, mean)
        # On a device, asking would take longer than going on.
        if isinstance(active, (np.ndarray, np.bool_)) and not active:
            break
    pivot = max(range(len(at.weights)), key=lambda model: at.weights[model])
    return found.shares(mean, directed, weights), pivot


def _stages(at: At, max_iter: int, tol: float) -> Stages:
    _check(at.weights, max_iter, tol)
    return () if len(at.weights) == 1 else combination(*_shares(at, max_iter, tol))


@op(
    statistic=lambda **_: Statistic("tensor", gram),
    reduces=True,
    check_weights=_check,
    fused=_stages,
)
def frechet_mean(
    stack: Stack,
    at: At,
    max_iter: Annotated[int, Interval(ge=1, le=1000)] = 10,
    tol: Annotated[float, Ge(0)] = 1e-5,
) -> Stack:
    """The direction with the least sum of squared angles times the mean length, per tensor.

    From the normalised weighted sum m of the unit vectors u_i: map all u_i into the tangent space
    at m, ``log_m(u) = θ/sin θ · (u - cos θ · m)``, take their weighted mean, and move m along it,
    ``exp_m(v) = cos ‖v‖ · m + sin ‖v‖ · v / ‖v‖``; repeat. A zero tensor has no direction and only
    shortens the result. Where the unit vectors cancel there is no mean direction, and the
    weighted arithmetic mean is taken.

    Parameters
    ----------
    max_iter : int in [1, 1000]
        How often the mean is moved.
    tol : float >= 0
        Stop where the move is shorter, in radians.

    Raises
    ------
    ParameterError
        If a weight is negative or all are zero.
    """
    _check(at.weights, max_iter, tol)
    if stack.shape[0] == 1:
        return stack
    return combined(stack, *_shares(at, max_iter, tol))
