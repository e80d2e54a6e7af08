"""TALL masks: the entries of a merged task vector that a task uses."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from mergebench.compute.masking import silence
from mergebench.compute.namespace import namespace
from mergebench.merge.op import At, Stack, op


@op(needs_models=True, apart="again", of_updates=True)
def tall_mask(stack: Stack, at: At, mask_lam: Annotated[float, Ge(0)] = 0.4) -> Stack:
    """Keep, for every task, the merged entries that it uses (TALL masks).

    The result of task i is ``merged`` where ``|τ_i| > mask_lam · |merged - τ_i|`` and zero
    elsewhere, with its task vector τ_i as it came in and ``merged`` what all have become before
    this op.

    Parameters
    ----------
    mask_lam : float, default 0.4
        λ_t of the masks; smaller values give larger masks.
    """
    xp = namespace(stack)
    assert at.models is not None
    uses = xp.abs(at.models) > mask_lam * xp.abs(stack - at.models)
    return silence(stack, uses)
