"""Model Breadcrumbs: drop outliers and small entries, then sum."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.band import band
from mergebench.merge.ops.mean import mean
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2312.06795",
    compat={
        "official": {"count": "exact"},
        "mergekit-0.1.5": {
            "density": 1.0,
            "gamma": 0.01,
            "lam": 1.0,
            "scope": "tensor",
            "count": "exact",
            "conflict": "keep",
        },
    },
    checked={"mergekit 0.1.5": "8 roundings"},
)
def breadcrumbs(
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2,
    gamma: Annotated[float, Interval(ge=0, lt=1)] = 0.1,
    lam: float = 0.4,
    scope: Literal["row", "tensor", "model"] = "row",
    count: Literal["exact", "at_least_one"] = "at_least_one",
    conflict: Literal["drop", "keep"] = "drop",
    normalize: bool = False,
) -> Chain:
    """Drop the largest and the small entries of each task vector, then sum.

    Parameters
    ----------
    density : float in (0, 1], default 0.2
        Share kept (β in the authors' code; the paper's β is the share of small entries cut).
    gamma : float in [0, 1), default 0.1
        Share of largest magnitudes removed as outliers.
    lam : float, default 0.4
        Global scale λ (the paper's α).
    scope : row, tensor or model, default row
        Over what the shares are taken; a row is the last dimension, a vector is one row.
    count : exact or at_least_one, default at_least_one
        Whether a row too short for its share keeps nothing, or one entry.
    conflict : drop or keep, default drop
        Which share yields where both add up to more than everything.
    normalize : true or false, default false
        Divide by the sum of the weights.

    Deviations
    ----------
    Defaults are those of the authors' code, which empties rows shorter than 1 / density; here a
    nonempty row keeps at least one entry (`count` = exact restores it, except that a scalar is
    emptied too). The paper describes shares of the whole layer (`scope` = tensor). mergekit
    works per tensor and keeps the density where the shares conflict.
    """
    combined = [mean()] if normalize else [weigh(), sum_()]
    return chain(band(density, gamma, scope, count, conflict), *combined, scale(lam))
