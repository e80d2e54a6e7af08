"""Trim: keep the largest magnitudes of every task vector."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.compute.cut import ALL, Cut
from mergebench.compute.keep import keep_mask, row_ranks_mask
from mergebench.compute.masking import silence
from mergebench.compute.select import kth_magnitudes
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.kernels.stages import RowWindow, Stages, Window
from mergebench.merge.op import Granularity, op

Scope = Literal["row", "tensor", "model"]
Count = Literal["exact", "at_least_one", "official"]


def kept(size: int, density: float, count: Count) -> int:
    """How many of ``size`` entries stay: ⌊ρd⌋, at least 1, or the official ⌊ρd⌋ + 1 (and ties)."""
    number = int(density * size)
    if count == "at_least_one":
        return max(number, 1)
    return min(number + 1, size) if count == "official" else number


def _measure(sweep: Sweep, density: float, count: Count) -> list[Cut]:
    rank = kept(sweep.size, density, count)
    cuts = [row[0] for row in kth_magnitudes(sweep, [[rank]] * sweep.models)]
    if count == "official":
        # The official code compares with >=, so every tie of the threshold survives.
        cuts = [cut if cut is ALL else Cut(cut.value, ALL_TIES) for cut in cuts]
    return cuts


#: Sorts after every tensor name, so that all ties stand before the cut.
ALL_TIES = b"\xff" * 8


def _statistic(density: float, scope: Scope, count: Count) -> Statistic | None:
    if scope == "row" or density >= 1:
        return None
    return Statistic(scope, partial(_measure, density=density, count=count))


def _granularity(density: float, scope: Scope, count: Count) -> Granularity:
    return "row" if scope == "row" and density < 1 else "entry"


def _stages(at: At, density: float, scope: Scope, count: Count) -> Stages | None:
    if density >= 1:
        return ()
    if scope == "row":
        return (RowWindow((0,), (kept(at.site.row, density, count),), (count == "official",)),)
    return (Window(tuple(at.value)),)


@op(granularity=_granularity, statistic=_statistic, alone=True, fused=_stages)
def trim(
    stack: Stack,
    at: At,
    density: Annotated[float, Interval(gt=0, le=1)],
    scope: Scope = "model",
    count: Count = "exact",
) -> Stack:
    """Keep the ``density`` share of entries that is largest by magnitude, zero the others.

    Parameters
    ----------
    density : float in (0, 1]
        Share kept, ρ.
    scope : row, tensor or model
        Over what the share is taken. A row is the last dimension; a vector is one row.
    count : exact, at_least_one or official
        Of d entries keep exactly ⌊ρd⌋, earlier entries first among equals; at least one; or
        those not below the (d - ⌊ρd⌋)-th smallest magnitude, which is ⌊ρd⌋ + 1 and all ties.
    """
    if density >= 1:
        return stack
    if scope == "row":
        length = at.site.row
        mask = row_ranks_mask(stack, length, 0, kept(length, density, count), count == "official")
    else:
        mask = keep_mask(stack, at.value, at.site.name, at.start)
    return silence(stack, mask)
