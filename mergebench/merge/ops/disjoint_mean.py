"""Combine, entry by entry, only the models that have something there."""

from __future__ import annotations

from typing import Literal

from mergebench.compute.masking import silence
from mergebench.compute.namespace import namespace
from mergebench.merge.at import At, Stack
from mergebench.merge.kernels.stages import Disjoint, Stages
from mergebench.merge.op import op

Divisor = Literal["count", "weights", "none", "max"]
Cancelled = Literal["zero", "sum"]


def _stages(at: At, divisor: Divisor, cancelled: Cancelled) -> Stages | None:
    return None if divisor == "max" else (Disjoint(at.weights, divisor, cancelled),)


@op(reduces=True, fused=_stages)
def disjoint_mean(
    stack: Stack, at: At, divisor: Divisor = "count", cancelled: Cancelled = "zero"
) -> Stack:
    """``Σ_i w_i x_i`` divided by what stands behind it, over the non-zero entries (TIES, step 3).

    Parameters
    ----------
    divisor : count, weights, none or max
        The number of non-zero values (at least 1); the sum of their weights; nothing, so a sum;
        or the weighted value of largest magnitude alone.
    cancelled : zero or sum
        The result where the weights of the non-zero values sum to exactly zero: zero, or the
        undivided sum.
    """
    xp = namespace(stack)
    shares = xp.asarray(at.weights, dtype=stack.dtype, device=stack.device)[:, None]
    weighted = stack * shares
    if divisor == "max":
        largest = xp.max(weighted, axis=0, keepdims=True)
        smallest = xp.min(weighted, axis=0, keepdims=True)
        upper = largest >= -smallest
        return silence(largest, upper) + silence(smallest, ~upper)
    total = _added(weighted)
    if divisor == "none":
        return total
    present = xp.astype(stack != 0, stack.dtype)
    if divisor == "count":
        behind = _added(present)
        return total / (behind + xp.astype(behind == 0, stack.dtype))
    behind = _added(present * shares)
    empty = behind == 0
    divided = total / (behind + xp.astype(empty, stack.dtype))
    return divided if cancelled == "sum" else silence(divided, ~empty)


def _added(stack: Stack) -> Stack:
    # One model after the other, so that the rounding does not depend on the library.
    total = stack[0:1, :]
    for model in range(1, stack.shape[0]):
        total = total + stack[model : model + 1, :]
    return total
