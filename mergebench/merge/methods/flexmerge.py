"""FlexMerge: models between one for all tasks and one for each."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.flexmerge import flexmerge as flexmerge_
from mergebench.merge.ops.trim import trim
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2505.23209")
def flexmerge(
    size: Annotated[float, Ge(1)] = 2.0,
    merger: Literal["average", "ties"] = "average",
    lam: float = 1.0,
    density: Annotated[float, Interval(gt=0, le=1)] = 1.0,
    linkage: Literal["complete", "average", "single"] = "complete",
    blocks: Literal["part", "layer", "tensor"] = "part",
) -> Chain:
    """One model per task, of blocks that alike tasks share: accuracy against size.

    Every task begins with all blocks for itself. The two groups of tasks that are most alike in
    some block share it, again and again, until all blocks together take no more than ``size``
    models; what a group shares is merged from the original task vectors.

    Parameters
    ----------
    size : float >= 1, default 2
        In models: 1 is one model for all tasks, the number of models gives every model back. A
        list of sizes gives the curve, every task at each of them.
    merger : average or ties, default average
        What a group shares: the mean of its task vectors (task arithmetic, with λ), or the mean
        of those that have the sign of their sum.
    lam : float, default 1.0
        Scale λ of what several tasks share; searched on validation data in the paper. What a task
        has for itself is not scaled.
    density : float in (0, 1], default 1.0
        Share of entries that each task vector keeps, over the whole model, in what several tasks
        share; 0.2 is usual with merger=ties. What a task has for itself is not trimmed.
    linkage : complete, average or single, default complete
        Groups are as alike as their least alike members (the paper's choice, which its code calls
        single), as all pairs on average, or as the most alike members (complete in that code).
    blocks : part, layer or tensor, default part
        What is shared as a whole: attention, MLP and each norm of numbered blocks and every module
        outside of them, whole numbered blocks, or tensors.

    Notes
    -----
    Every result is written as a whole model, whatever it shares with others; the size is that of
    the blocks that differ.

    Deviations
    ----------
    The last step may end below the size, by less than a block. Two zero task vectors count as
    alike, a zero and another one as at right angles. With ties, entries whose sum is exactly zero
    are zero. EMR, Consensus and PCB within groups are left out.
    """
    each = flexmerge_(size, merger, lam, linkage, blocks)
    return chain(weigh(), trim(density, "model"), each)
