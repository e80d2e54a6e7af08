"""Blend the last model with the mean of those before it."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


@op(linear=True, reduces=True, ordered=True)
def blend_last(stack: Stack, at: At, m: Annotated[float, Interval(ge=0, le=1)] = 0.1) -> Stack:
    """``(1 - m) τ_b + m · mean_{j<b} τ_j``, b the last model in the order of the user.

    Parameters
    ----------
    m : float in [0, 1], default 0.1
        Share of the earlier models. Without any, the last one stays as it is.
    """
    *earlier, last = at.in_order(stack.shape[0])
    if not earlier:
        return stack
    # In the order of the stack, so that the earlier ones may come in any.
    first, *others = sorted(earlier)
    total = stack[first : first + 1, :]
    for model in others:
        total = total + stack[model : model + 1, :]
    return stack[last : last + 1, :] * (1 - m) + total * (m / len(earlier))
