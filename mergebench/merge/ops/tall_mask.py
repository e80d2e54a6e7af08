"""TALL masks: the entries of a merged task vector that a task uses."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from mergebench.compute.masking import silence
from mergebench.compute.namespace import namespace
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


def _masks(stack: Stack, at: At, mask_lam: float) -> tuple[Stack, Stack, None]:
    assert at.models is not None
    xp = namespace(stack)
    return stack, xp.abs(at.models) > mask_lam * xp.abs(stack - at.models), None


@op(needs_models=True, apart="again", of_updates=True, masks=_masks)
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
    merged, uses, _ = _masks(stack, at, mask_lam)
    return silence(merged, uses)
