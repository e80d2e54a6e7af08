"""Clip: limit magnitudes."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from mergebench.compute.namespace import namespace
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


@op()
def clip(stack: Stack, at: At, t: Annotated[float, Ge(0)]) -> Stack:
    """Bring entries beyond ``±t`` back to it.

    Parameters
    ----------
    t : float >= 0
        The largest magnitude that stays.
    """
    return namespace(stack).clip(stack, -t, t)
