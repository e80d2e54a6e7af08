"""Sum over models."""

from __future__ import annotations

from mergebench.merge.at import At, Stack
from mergebench.merge.kernels.stages import Add
from mergebench.merge.op import op


@op(linear=True, reduces=True, fused=lambda at: (Add(),))
def sum_(stack: Stack, at: At) -> Stack:
    """Add the models up, in their order: ``Σ_i x_i``."""
    total = stack[0:1, :]
    # One after the other, so that the rounding does not depend on the library.
    for model in range(1, stack.shape[0]):
        total = total + stack[model : model + 1, :]
    return total
