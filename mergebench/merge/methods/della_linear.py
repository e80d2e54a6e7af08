"""DELLA without an election: drop by rank, rescale, add."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.core.params import Seed
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.magprune import magprune
from mergebench.merge.ops.mean import mean
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2406.11617",
    compat={
        "mergekit-0.1.5": {"density": 1.0, "epsilon": 0.15, "rescale": "l1", "normalize": False}
    },
    checked={"mergekit 0.1.5": "moments, 5σ"},
)
def della_linear(
    density: Annotated[float, Interval(gt=0, le=1)] = 0.7,
    epsilon: Annotated[float, Interval(ge=0, le=0.5)] = 0.07,
    lam: float = 1.0,
    seed: Seed = 0,
    rescale: Literal["probability", "l1", "none"] = "probability",
    normalize: bool = False,
) -> Chain:
    """Drop entries at random, small ones of a row more often, rescale, add or average them.

    Parameters
    ----------
    density : float in (0, 1], default 0.7
        Mean probability ρ that an entry stays. A density of 1 keeps everything.
    epsilon : float in [0, 0.5], default 0.07
        Half the distance between the largest and the smallest probability, as in `della`.
    lam : float, default 1.0
        Global scale λ.
    seed : int, default 0
        Another seed drops other entries; see `dare` for what else they depend on.
    rescale : probability, l1 or none, default probability
        Divide by the entry's own probability; restore the L1 norm of each tensor; or do not
        rescale.
    normalize : true or false, default false
        Divide the sum by the sum of the weights.

    Deviations
    ----------
    The paper elects signs (`della`); this is mergekit's variant without. mergekit restores the L1
    norm of every tensor: preset ``mergekit-0.1.5``.
    """
    combined = (mean(),) if normalize else (weigh(), sum_())
    return chain(magprune(density, epsilon, seed, rescale), *combined, scale(lam))
