"""Weighted mean over models."""

from __future__ import annotations

from mergebench.core.errors import ParameterError
from mergebench.merge.op import At, Stack, op


@op(linear=True, reduces=True)
def mean(stack: Stack, at: At) -> Stack:
    """Weighted mean: ``Σ_i w_i x_i / Σ_i w_i``.

    Raises
    ------
    ParameterError
        If the weights sum to zero.
    """
    total = sum(at.weights)
    if total == 0:
        raise ParameterError(
            "mean: the weights sum to zero", got=str(list(at.weights)), fix="use op `sum`"
        )
    merged = stack[0:1, :] * (at.weights[0] / total)
    for model in range(1, stack.shape[0]):
        merged = merged + stack[model : model + 1, :] * (at.weights[model] / total)
    return merged
