"""Weigh: multiply every model by the weight its user gave it."""

from __future__ import annotations

from mergebench.compute.namespace import namespace
from mergebench.merge.at import At, Stack
from mergebench.merge.kernels.stages import Multiply
from mergebench.merge.op import op


@op(linear=True, fused=lambda at: (Multiply(at.weights),))
def weigh(stack: Stack, at: At) -> Stack:
    """Multiply each model by its weight: ``x_i ← w_i · x_i``."""
    xp = namespace(stack)
    return stack * xp.asarray(at.weights, dtype=stack.dtype, device=stack.device)[:, None]
