"""TIES-Merging: trim, elect sign, disjoint merge."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.disjoint_mean import disjoint_mean
from mergebench.merge.ops.elect_sign import elect_sign
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.trim import trim


@merge_method(
    paper="arXiv:2306.01708",
    compat={
        "official": {"count": "official"},
        "mergekit-0.1.5": {
            "density": 1.0,
            "scope": "tensor",
            "count": "at_least_one",
            "election": "weighted",
            "tie": "plus",
            "divisor": "weights",
            "cancelled": "sum",
        },
        "peft-0.21": {"scope": "tensor", "tie": "plus", "divisor": "count"},
        "fusionbench": {"count": "official", "divisor": "none", "lam": 0.3},
    },
    checked={"mergekit 0.1.5": "8 roundings", "FusionBench 0.2.33": "1e-05", "PEFT 0.21": "1e-04"},
)
def ties(
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2,
    lam: Annotated[float, Ge(0)] = 1.0,
    scope: Literal["row", "tensor", "model"] = "model",
    count: Literal["exact", "at_least_one", "official"] = "exact",
    sign: Literal["mass", "count"] = "mass",
    election: Literal["unweighted", "weighted"] = "unweighted",
    tie: Literal["majority", "plus", "minus", "zero"] = "majority",
    divisor: Literal["count", "weights", "none", "max"] = "count",
    cancelled: Literal["zero", "sum"] = "zero",
) -> Chain:
    """Trim small entries, elect one sign per entry, average what agrees.

    Parameters
    ----------
    density : float in (0, 1], default 0.2
        Share of entries kept in each task vector.
    lam : float >= 0, default 1.0
        Global scale λ. About 1 suits the mean; a sum wants about 1 / N.
    scope : row, tensor or model, default model
        Over what the largest entries are counted.
    count : exact, at_least_one or official, default exact
        Keep ⌊ρd⌋ of d entries, earlier (tensor name, index) first among equals; at least one of
        them; or ⌊ρd⌋ + 1 with all ties of the threshold.
    sign : mass or count, default mass
        Elect the sign of the sum of values, or of the sum of signs.
    election : unweighted or weighted, default unweighted
        Whether the models' weights take part in the election.
    tie : majority, plus, minus or zero, default majority
        The sign where the sum is exactly zero: that of the sum of all elected signs of the
        model (negative if zero too), positive, negative, or no sign, which leaves the base.
    divisor : count, weights, none or max, default count
        Divide the weighted sum of agreeing values by their number, by the sum of their weights,
        not at all, or take the largest of them.
    cancelled : zero or sum, default zero
        With `divisor` = weights, what stands where agreeing weights sum to exactly zero: zero,
        or the undivided sum.

    Deviations
    ----------
    The authors' code keeps one entry too many and all ties of the threshold, and cannot keep
    everything; `compat` preset ``official`` counts as it does. Tied tensors are counted once.
    mergekit trims per tensor, votes with weighted values and divides by the sum of agreeing
    weights, which negative weights can bring near zero (there it does not divide); PEFT
    trims and votes per tensor without weights; FusionBench sums (presets ``mergekit-0.1.5``,
    ``peft-0.21``, ``fusionbench``). PEFT's preset works on ΔW as its ``ties_svd`` does: trimming
    the factors A and B, as its ``ties`` does, depends on the basis they are written in.
    """
    return chain(
        trim(density, scope, count),
        elect_sign(sign, election, tie),
        disjoint_mean(divisor, cancelled),
        scale(lam),
    )
