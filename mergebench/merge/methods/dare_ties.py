"""DARE with the election of TIES."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.core.params import Seed
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.disjoint_mean import disjoint_mean
from mergebench.merge.ops.drop import drop
from mergebench.merge.ops.elect_sign import elect_sign
from mergebench.merge.ops.scale import scale


@merge_method(
    paper="arXiv:2311.03099",
    compat={
        "mergekit-0.1.5": {
            "density": 1.0,
            "rescale": "l1",
            "election": "weighted",
            "tie": "plus",
            "divisor": "none",
            "cancelled": "sum",
        }
    },
    checked={"mergekit 0.1.5": "moments, 5σ"},
)
def dare_ties(
    density: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    lam: float = 1.0,
    seed: Seed = 0,
    rescale: Literal["density", "l1", "none"] = "density",
    sign: Literal["mass", "count"] = "mass",
    election: Literal["unweighted", "weighted"] = "unweighted",
    tie: Literal["majority", "plus", "minus", "zero"] = "majority",
    divisor: Literal["count", "weights", "none", "max"] = "count",
    cancelled: Literal["zero", "sum"] = "zero",
) -> Chain:
    """Drop entries at random and rescale, elect one sign per entry, average what agrees.

    Parameters
    ----------
    density : float in (0, 1], default 0.5
        Probability ρ that an entry stays.
    lam : float, default 1.0
        Global scale λ.
    seed : int, default 0
        Another seed drops other entries; see `dare` for what else they depend on.
    rescale : density, l1 or none, default density
        Divide by ρ as the paper does; restore the L1 norm of each tensor; or do not rescale.
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
    The paper drops at random in place of the trimming of TIES and leaves the rest as it is there.
    mergekit restores the L1 norm of every tensor, elects with weighted values and sums without
    dividing (its ``normalize: true`` is `divisor` = weights): preset ``mergekit-0.1.5``.
    """
    return chain(
        drop(density, seed, rescale),
        elect_sign(sign, election, tie),
        disjoint_mean(divisor, cancelled),
        scale(lam),
    )
