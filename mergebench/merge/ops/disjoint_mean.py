"""Combine, entry by entry, only the models that have something there."""

from __future__ import annotations

from typing import Literal

from mergebench.compute.namespace import namespace
from mergebench.merge.op import At, Stack, op

Divisor = Literal["count", "weights", "none", "max"]


@op(reduces=True)
def disjoint_mean(stack: Stack, at: At, divisor: Divisor = "count") -> Stack:
    """``Σ_i w_i x_i`` divided by what stands behind it, over the non-zero entries (TIES, step 3).

    Parameters
    ----------
    divisor : count, weights, none or max
        The number of non-zero values (at least 1); the sum of their weights (the result is 0
        where that is 0); nothing, so a sum; or the weighted value of largest magnitude alone.
    """
    xp = namespace(stack)
    weighted = stack * xp.asarray(at.weights, dtype=stack.dtype)[:, None]
    if divisor == "max":
        largest = xp.max(weighted, axis=0, keepdims=True)
        smallest = xp.min(weighted, axis=0, keepdims=True)
        return xp.where(largest >= -smallest, largest, smallest)
    # One model after the other, so that the rounding does not depend on the library.
    total = weighted[0:1, :]
    for model in range(1, stack.shape[0]):
        total = total + weighted[model : model + 1, :]
    if divisor == "none":
        return total
    present = xp.astype(stack != 0, stack.dtype)
    if divisor == "weights":
        present = present * xp.asarray(at.weights, dtype=stack.dtype)[:, None]
    behind = present[0:1, :]
    for model in range(1, stack.shape[0]):
        behind = behind + present[model : model + 1, :]
    empty = behind == 0
    return xp.where(
        empty, xp.zeros_like(total), total / xp.where(empty, xp.ones_like(behind), behind)
    )
