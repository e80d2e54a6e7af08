"""Scale: multiply by a number."""

from __future__ import annotations

from mergebench.merge.at import At, Stack
from mergebench.merge.kernels.stages import Multiply
from mergebench.merge.op import op


@op(linear=True, fused=lambda at, lam: (Multiply((lam,)),))
def scale(stack: Stack, at: At, lam: float) -> Stack:
    """Multiply by ``lam``; negative values negate a task."""
    return stack * lam
