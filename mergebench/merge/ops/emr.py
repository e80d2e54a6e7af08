"""EMR: elect one vector for all tasks, mask it for each, rescale what is left."""

from __future__ import annotations

from typing import Literal

from mergebench.compute.masking import silence
from mergebench.compute.matrices import sum_rows
from mergebench.compute.namespace import namespace
from mergebench.compute.sums import totals
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.op import op

#: What counts alike in the means that rescale: every entry of the model, or every tensor.
Over = Literal["entries", "tensors"]


def elected(stack: Stack) -> tuple[Stack, Stack]:
    """The unified task vector, (1, m), and the masks of the tasks that agree with it, (n, m).

    The sign of an entry is that of the sum over tasks, negative where that is zero; its magnitude
    the largest among the tasks of that sign, zero if there is none.
    """
    xp = namespace(stack)
    positive = sum_rows(stack) > 0
    agrees = ((stack > 0) & positive) | ((stack < 0) & ~positive)
    size = xp.max(xp.abs(silence(stack, agrees)), axis=0, keepdims=True)
    return xp.where(positive, size, -size), agrees


def _scales(sweep: Sweep, over: Over) -> Stack:
    """``Σ |τ_i| / Σ |mask_i ⊙ unified|`` per task, float64, (n,)."""
    count = sweep.models

    def terms(stack: Stack, at: At) -> Stack:
        xp = namespace(stack)
        unified, agrees = elected(stack)
        sizes = xp.abs(xp.concat([stack, silence(unified, agrees)], axis=0))
        if over == "tensors":
            sizes = xp.astype(sizes, xp.float64) / at.site.size
        return sizes

    sums = totals(sweep, terms, 2 * count)
    before, after = sums[:count], sums[count:]
    xp = namespace(sums)
    # A task that agrees nowhere has nothing to be rescaled.
    lost = xp.astype(after == 0, sums.dtype)
    return before / (after + lost)


def _statistic(over: Over) -> Statistic:
    return Statistic("model", lambda sweep: _scales(sweep, over))


def _masks(stack: Stack, at: At, over: Over) -> tuple[Stack, Stack, Stack]:
    unified, agrees = elected(stack)
    return unified, agrees, at.value


@op(statistic=_statistic, apart="each", masks=_masks)
def emr(stack: Stack, at: At, over: Over = "entries") -> Stack:
    """Every task's share of one elected vector: ``scale_i · mask_i ⊙ unified`` (EMR-Merging).

    Parameters
    ----------
    over : entries or tensors, default entries
        scale_i is mean |τ_i| / mean |mask_i ⊙ unified|, over all entries of the model, or the
        sums of these means over its tensors, so that small tensors count as much as large ones.
    """
    xp = namespace(stack)
    unified, agrees = elected(stack)
    return silence(unified, agrees) * xp.astype(at.value, stack.dtype)[:, None]
