"""Breadcrumbs with the election of TIES."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.band import band
from mergebench.merge.ops.disjoint_mean import disjoint_mean
from mergebench.merge.ops.elect_sign import elect_sign
from mergebench.merge.ops.scale import scale


@merge_method(
    paper="arXiv:2312.06795",
    compat={
        "mergekit-0.1.5": {
            "density": 1.0,
            "gamma": 0.01,
            "lam": 1.0,
            "scope": "tensor",
            "count": "exact",
            "conflict": "keep",
            "election": "weighted",
            "tie": "plus",
            "divisor": "none",
            "cancelled": "sum",
        },
    },
    checked={"mergekit 0.1.5": "8 roundings"},
)
def breadcrumbs_ties(
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2,
    gamma: Annotated[float, Interval(ge=0, lt=1)] = 0.1,
    lam: float = 1.0,
    scope: Literal["row", "tensor", "model"] = "row",
    count: Literal["exact", "at_least_one"] = "at_least_one",
    conflict: Literal["drop", "keep"] = "drop",
    sign: Literal["mass", "count"] = "mass",
    election: Literal["unweighted", "weighted"] = "unweighted",
    tie: Literal["majority", "plus", "minus", "zero"] = "majority",
    divisor: Literal["count", "weights", "none", "max"] = "count",
    cancelled: Literal["zero", "sum"] = "zero",
) -> Chain:
    """Drop the largest and the small entries, elect one sign per entry, average what agrees.

    Parameters
    ----------
    density : float in (0, 1], default 0.2
        Share kept of each task vector.
    gamma : float in [0, 1), default 0.1
        Share of largest magnitudes removed as outliers.
    lam : float, default 1.0
        Global scale λ.
    scope : row, tensor or model, default row
        Over what the shares are taken; a row is the last dimension, a vector is one row.
    count : exact or at_least_one, default at_least_one
        Whether a row too short for its share keeps nothing, or one entry.
    conflict : drop or keep, default drop
        Which share yields where both add up to more than everything.
    sign : mass or count, default mass
        Elect the sign of the sum of values, or of the sum of signs.
    election : unweighted or weighted, default unweighted
        Whether the models' weights take part in the election.
    tie : majority, plus, minus or zero, default majority
        The sign where the sum is exactly zero, as in `ties`.
    divisor : count, weights, none or max, default count
        What the sum of agreeing values is divided by, as in `ties`.
    cancelled : zero or sum, default zero
        With `divisor` = weights, what stands where agreeing weights sum to exactly zero.

    Deviations
    ----------
    The paper has no election; this is the mask of `breadcrumbs` before the election of `ties`, as
    mergekit offers it. mergekit works per tensor, elects with weighted values and sums without
    dividing (its ``normalize: true`` is `divisor` = weights): preset ``mergekit-0.1.5``.
    """
    return chain(
        band(density, gamma, scope, count, conflict),
        elect_sign(sign, election, tie),
        disjoint_mean(divisor, cancelled),
        scale(lam),
    )
