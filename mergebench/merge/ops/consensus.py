"""Consensus: keep the merged entries that enough tasks use (TALL masks)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Interval

from mergebench.compute.masking import silence
from mergebench.compute.namespace import namespace
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


@op(needs_models=True, of_updates=True)
def consensus(
    stack: Stack,
    at: At,
    k: Annotated[int, Interval(ge=0, le=10_000)] = 2,
    mask_lam: Annotated[float, Ge(0)] = 0.4,
) -> Stack:
    """Zero merged entries that fewer than ``k`` tasks use (TALL masks).

    Task i uses an entry where ``|τ_i| > mask_lam · |merged - τ_i|``, of its task vector as it came
    in and of what all have become before this op.

    Parameters
    ----------
    k : int, default 2
        0 keeps everything; 1 drops what no task uses; 2 also what only one does; the number of
        models keeps the intersection.
    mask_lam : float, default 0.4
        λ_t of the masks; smaller values give larger masks.
    """
    xp = namespace(stack)
    assert at.models is not None
    uses = None
    for model in range(at.models.shape[0]):
        task = at.models[model : model + 1, :]
        used = xp.abs(task) > mask_lam * xp.abs(stack - task)
        count = xp.astype(used, xp.int32)
        uses = count if uses is None else uses + count
    return stack if uses is None else silence(stack, uses >= k)
