"""Band: drop the outliers, keep the largest of what remains."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.compute.cut import Cut
from mergebench.compute.keep import keep_mask, row_ranks_mask
from mergebench.compute.masking import silence
from mergebench.compute.select import kth_magnitudes
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.kernels.stages import RowWindow, Stages, Window
from mergebench.merge.op import Granularity, op

Scope = Literal["row", "tensor", "model"]
Count = Literal["exact", "at_least_one"]
Conflict = Literal["drop", "keep"]


def ranks(
    size: int, density: float, gamma: float, count: Count, conflict: Conflict
) -> tuple[int, int]:
    """``(low, high)``: of ``size`` magnitudes those of rank ``low < rank <= high`` stay."""
    keep = int(density * size)
    if count == "at_least_one" and size > 0:
        keep = max(keep, 1)
    drop = int(gamma * size)
    if conflict == "keep":
        drop = min(drop, size - keep)
    return drop, min(drop + keep, size)


def _measure(
    sweep: Sweep, density: float, gamma: float, count: Count, conflict: Conflict
) -> tuple[list[Cut], list[Cut]]:
    low, high = ranks(sweep.size, density, gamma, count, conflict)
    cuts = kth_magnitudes(sweep, [[low, high]] * sweep.models)
    return [row[0] for row in cuts], [row[1] for row in cuts]


def _statistic(
    density: float, gamma: float, scope: Scope, count: Count, conflict: Conflict
) -> Statistic | None:
    if scope == "row":
        return None
    return Statistic(
        scope,
        partial(_measure, density=density, gamma=gamma, count=count, conflict=conflict),
    )


def _granularity(scope: Scope, **_: object) -> Granularity:
    return "row" if scope == "row" else "entry"


def _stages(
    at: At, density: float, gamma: float, scope: Scope, count: Count, conflict: Conflict
) -> Stages:
    if scope == "row":
        low, high = ranks(at.site.row, density, gamma, count, conflict)
        return (RowWindow((low,), (high,), (False,)),)
    outliers, kept = at.value
    return (Window(tuple(kept), tuple(outliers)),)


@op(granularity=_granularity, statistic=_statistic, alone=True, fused=_stages)
def band(
    stack: Stack,
    at: At,
    density: Annotated[float, Interval(gt=0, le=1)],
    gamma: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    scope: Scope = "row",
    count: Count = "at_least_one",
    conflict: Conflict = "drop",
) -> Stack:
    """Zero the ``gamma`` share of largest magnitudes, then keep the ``density`` share below them.

    Parameters
    ----------
    density : float in (0, 1]
        Share kept, ⌊density · d⌋ of d entries.
    gamma : float in [0, 1)
        Share of outliers dropped, ⌊gamma · d⌋ of d entries.
    scope : row, tensor or model
        Over what the shares are taken. A row is the last dimension; a vector is one row.
    count : exact or at_least_one
        Whether a row (tensor, model) so short that nothing would stay keeps one entry.
    conflict : drop or keep
        Where the shares add up to more than everything: drop all outliers and keep fewer, or
        keep the density and drop fewer outliers.
    """
    if scope == "row":
        length = at.site.row
        mask = row_ranks_mask(stack, length, *ranks(length, density, gamma, count, conflict))
    else:
        outliers, kept = (keep_mask(stack, cuts, at.site.name, at.start) for cuts in at.value)
        mask = kept & ~outliers
    return silence(stack, mask)
