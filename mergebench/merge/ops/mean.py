"""Weighted mean over models."""

from __future__ import annotations

from collections.abc import Sequence

from mergebench.compute.masking import moved
from mergebench.core.errors import ParameterError
from mergebench.merge.at import At, Stack
from mergebench.merge.kernels.stages import Stages, Step
from mergebench.merge.op import op


def _check(weights: Sequence[float]) -> None:
    if sum(weights) == 0:
        raise ParameterError(
            "mean: the weights sum to zero",
            got=str(list(weights)),
            fix="take the sum: -p normalize=false, or op `sum`",
        )


def _shares(weights: Sequence[float]) -> tuple[int, dict[int, float]]:
    """The heaviest model, and the shares of the others that have one."""
    pivot = max(range(len(weights)), key=lambda model: abs(weights[model]))
    total = sum(weights)
    others = ((model, weight) for model, weight in enumerate(weights) if model != pivot)
    return pivot, {model: weight / total for model, weight in others if weight}


def _stages(at: At) -> Stages:
    _check(at.weights)
    pivot, shares = _shares(at.weights)
    return (Step(pivot, tuple(shares), tuple(shares.values()), exact=True),)


@op(linear=True, reduces=True, check_weights=_check, fused=_stages)
def mean(stack: Stack, at: At) -> Stack:
    """Weighted mean: ``Σ_i w_i x_i / Σ_i w_i``.

    Raises
    ------
    ParameterError
        If the weights sum to zero.
    """
    _check(at.weights)
    # Moving from the heaviest model towards the others leaves entries that are equal in all models
    # as they are, to the last bit, and a model of weight 1 among weights 0 too.
    pivot, shares = _shares(at.weights)
    start = stack[pivot : pivot + 1, :]
    step = None
    for model, share in shares.items():
        part = (stack[model : model + 1, :] - start) * share
        step = part if step is None else step + part
    return start if step is None else moved(start, step)
