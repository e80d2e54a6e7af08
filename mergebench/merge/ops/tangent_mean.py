"""The mean of directions in one tangent space, with the mean length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergebench.compute.gram import combined, gram
from mergebench.compute.namespace import namespace
from mergebench.compute.sphere import Directions, Tangent
from mergebench.merge.at import At, Stack, Statistic
from mergebench.merge.kernels.stages import Multiply, Stages, combination
from mergebench.merge.op import op
from mergebench.merge.ops.slerp import check_total


def _check(weights: Sequence[float], tangent: Tangent, normalize: bool) -> None:
    if normalize:
        check_total("tangent_mean", weights)


def _total(weights: Sequence[float], normalize: bool) -> float:
    return sum(weights) if normalize else 1.0


def _shares(at: At, tangent: Tangent, normalize: bool) -> tuple[Any, int]:
    """Coefficients of the models, (n,), and the heaviest."""
    total = _total(at.weights, normalize)
    xp = namespace(at.value)
    weights = xp.asarray(at.weights, dtype=xp.float64, device=at.value.device) / total
    found = Directions.of(at.value, weights, normalize=normalize)
    mean, directed = found.start()
    mean, _ = found.moved(mean, found.step(mean, tangent))
    pivot = max(range(len(at.weights)), key=lambda model: abs(at.weights[model]))
    return found.shares(mean, directed, weights), pivot


def _stages(at: At, tangent: Tangent, normalize: bool) -> Stages:
    _check(at.weights, tangent, normalize)
    if len(at.weights) == 1:
        return (Multiply((at.weights[0] / _total(at.weights, normalize),)),)
    return combination(*_shares(at, tangent, normalize))


@op(
    statistic=lambda **_: Statistic("tensor", gram),
    reduces=True,
    check_weights=_check,
    fused=_stages,
)
def tangent_mean(stack: Stack, at: At, tangent: Tangent = "log", normalize: bool = True) -> Stack:
    """Weighted mean of directions in the tangent space at their normalised sum, per tensor.

    Mapped back onto the sphere, it is multiplied by the weighted mean length. A zero tensor has no
    direction and only shortens the result. Where the unit vectors cancel there is no mean
    direction, and the weighted arithmetic mean is taken.

    Parameters
    ----------
    tangent : log or projection
        Map u by ``θ/sin θ · (u - cos θ · m)``, or without the factor.
    normalize : true or false
        Divide the weights by their sum.

    Raises
    ------
    ParameterError
        If weights that are to be normalised sum to zero.
    """
    _check(at.weights, tangent, normalize)
    if stack.shape[0] == 1:
        return stack * (at.weights[0] / _total(at.weights, normalize))
    return combined(stack, *_shares(at, tangent, normalize))
