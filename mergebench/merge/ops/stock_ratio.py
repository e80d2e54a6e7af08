"""Model Stock's step from the base towards the mean of its fine-tunes."""

from __future__ import annotations

from typing import Any, Literal

from mergebench.compute.gram import gram, row_inner_products
from mergebench.compute.namespace import namespace
from mergebench.merge.at import At, Stack, Statistic
from mergebench.merge.kernels.stages import Multiply, Stages
from mergebench.merge.op import Granularity, op

Scope = Literal["row", "tensor"]
#: A denominator this near to zero leaves the base.
_VANISHED = 1e-6


def _statistic(scope: Scope, clamp: bool) -> Statistic | None:
    return Statistic("tensor", gram) if scope == "tensor" else None


def _granularity(scope: Scope, clamp: bool) -> Granularity:
    return "row" if scope == "row" else "entry"


def _stages(at: At, scope: Scope, clamp: bool) -> Stages | None:
    count = len(at.weights)
    if count == 1:
        return ()
    return None if scope == "row" else (Multiply((float(_ratio(at.value, count, clamp)),)),)


@op(granularity=_granularity, statistic=_statistic, fused=_stages)
def stock_ratio(stack: Stack, at: At, scope: Scope = "tensor", clamp: bool = False) -> Stack:
    """Multiply by ``t = N cos θ / (1 + (N - 1) cos θ)``, cos θ the mean over pairs of models.

    A zero task vector counts with a cosine of 0; a single model has t = 1.

    Parameters
    ----------
    scope : row or tensor
        Over what the angles are measured. A row is the last dimension; a vector is one row.
    clamp : true or false
        Keep t within 0 and 1; otherwise negative cosines lead beyond the base.
    """
    count = stack.shape[0]
    if count == 1 or stack.shape[1] == 0:
        return stack
    xp = namespace(stack)
    if scope == "tensor":
        return stack * xp.astype(_ratio(at.value, count, clamp)[None, None], stack.dtype)
    ratio = _ratio(row_inner_products(stack, at.site.row), count, clamp)
    lines = xp.reshape(stack, (count, -1, at.site.row))
    return xp.reshape(lines * xp.astype(ratio[None, :, None], stack.dtype), (count, -1))


def _ratio(products: Any, count: int, clamp: bool) -> Any:
    """The ratio t for inner products (…, n, n), shape (…)."""
    xp = namespace(products)
    squares = [products[..., model, model] for model in range(count)]
    lengths = [xp.sqrt(xp.where(square > 0, square, 1.0)) for square in squares]
    cosines = [
        products[..., one, other] / (lengths[one] * lengths[other])
        for one in range(count)
        for other in range(one)
    ]
    # Added up by size, one after the other: those that cancel in one order of the models, or by one
    # library, cancel in all.
    ordered = xp.sort(xp.stack(cosines), axis=0)
    total = ordered[0, ...]
    for place in range(1, len(cosines)):
        total = total + ordered[place, ...]
    cosine = total / (count * (count - 1) / 2)
    below = 1 + (count - 1) * cosine
    vanished = xp.abs(below) < _VANISHED
    ratio = xp.where(vanished, 0.0, count * cosine / xp.where(vanished, 1.0, below))
    return xp.clip(ratio, 0.0, 1.0) if clamp else ratio
