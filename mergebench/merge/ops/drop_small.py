"""Drop entries that hardly differ from zero."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from mergebench.compute.masking import silence
from mergebench.compute.namespace import namespace
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


@op()
def drop_small(stack: Stack, at: At, epsilon: Annotated[float, Ge(0)] = 1e-5) -> Stack:
    """Zero every entry whose magnitude is not above ``epsilon``.

    Parameters
    ----------
    epsilon : float >= 0
        In the units of the task vectors.
    """
    return silence(stack, namespace(stack).abs(stack) > epsilon)
