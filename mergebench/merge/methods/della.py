"""DELLA: drop entries at random, small ones more often, then elect signs and fuse."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.core.params import Seed
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.disjoint_mean import disjoint_mean
from mergebench.merge.ops.elect_sign import elect_sign
from mergebench.merge.ops.magprune import magprune
from mergebench.merge.ops.scale import scale


@merge_method(
    paper="arXiv:2406.11617",
    compat={
        "official": {"lam": 1.1},
        "mergekit-0.1.5": {
            "density": 1.0,
            "epsilon": 0.15,
            "rescale": "l1",
            "election": "weighted",
            "tie": "plus",
            "divisor": "weights",
            "cancelled": "sum",
        },
    },
    checked={"mergekit 0.1.5": "moments, 5σ"},
)
def della(
    density: Annotated[float, Interval(gt=0, le=1)] = 0.7,
    epsilon: Annotated[float, Interval(ge=0, le=0.5)] = 0.07,
    lam: float = 1.0,
    seed: Seed = 0,
    rescale: Literal["probability", "l1", "none"] = "probability",
    sign: Literal["mass", "count"] = "mass",
    election: Literal["unweighted", "weighted"] = "unweighted",
    tie: Literal["majority", "plus", "minus", "zero"] = "majority",
    divisor: Literal["count", "weights", "none", "max"] = "count",
    cancelled: Literal["zero", "sum"] = "zero",
) -> Chain:
    """Drop entries at random by their rank, elect one sign per entry, average what agrees.

    Within a row of n the entry of rank r (1 is the smallest magnitude) stays with probability
    ρ - ε + (r - 1)/(n - 1) · 2ε and is divided by it (MagPrune); `della_linear` adds what is left
    without an election.

    Parameters
    ----------
    density : float in (0, 1], default 0.7
        Mean probability ρ that an entry stays, 1 - p. A density of 1 keeps everything.
    epsilon : float in [0, 0.5], default 0.07
        Half the distance ε between the largest and the smallest probability: half of the authors'
        `window_size`. Both ρ - ε and ρ + ε must be in (0, 1].
    lam : float, default 1.0
        Global scale λ.
    seed : int, default 0
        Another seed drops other entries; see `dare` for what else they depend on.
    rescale : probability, l1 or none, default probability
        Divide by the entry's own probability; restore the L1 norm of each tensor; or do not
        rescale.
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
    The formula is that of the authors' code; a survey's has steps of 2ε/n, whose mean is not ρ.
    Density and ε are those of the authors' example, whose λ is the preset ``official``. A row of
    one entry has probability ρ, where mergekit raises an error. mergekit restores the L1 norm of
    every tensor, elects with weighted values and divides by the sum of agreeing weights: preset
    ``mergekit-0.1.5``. Which entries it drops is left to torch.
    """
    return chain(
        magprune(density, epsilon, seed, rescale),
        elect_sign(sign, election, tie),
        disjoint_mean(divisor, cancelled),
        scale(lam),
    )
