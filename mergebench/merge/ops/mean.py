"""Weighted mean over models."""

from __future__ import annotations

from collections.abc import Sequence

from mergebench.compute.masking import moved
from mergebench.core.errors import ParameterError
from mergebench.merge.op import At, Stack, op


def _check(weights: Sequence[float]) -> None:
    if sum(weights) == 0:
        raise ParameterError(
            "mean: the weights sum to zero",
            got=str(list(weights)),
            fix="take the sum: -p normalize=false, or op `sum`",
        )


@op(linear=True, reduces=True, check_weights=_check)
def mean(stack: Stack, at: At) -> Stack:
    """Weighted mean: ``Σ_i w_i x_i / Σ_i w_i``.

    Raises
    ------
    ParameterError
        If the weights sum to zero.
    """
    _check(at.weights)
    total = sum(at.weights)
    # Moving from the heaviest model towards the others leaves entries that are equal in all models
    # as they are, to the last bit, and a model of weight 1 among weights 0 too.
    pivot = max(range(len(at.weights)), key=lambda model: abs(at.weights[model]))
    start = stack[pivot : pivot + 1, :]
    step = None
    for model, weight in enumerate(at.weights):
        if model != pivot and weight:
            part = (stack[model : model + 1, :] - start) * (weight / total)
            step = part if step is None else step + part
    return start if step is None else moved(start, step)
