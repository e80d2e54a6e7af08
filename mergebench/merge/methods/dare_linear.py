"""DARE with task arithmetic, under the name and with the options that mergekit gives it."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.core.params import Seed
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.drop import drop
from mergebench.merge.ops.mean import mean
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2311.03099",
    compat={"mergekit-0.1.5": {"density": 1.0, "rescale": "l1", "normalize": False}},
    checked={"mergekit 0.1.5": "moments, 5σ"},
)
def dare_linear(
    density: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    lam: float = 1.0,
    seed: Seed = 0,
    rescale: Literal["density", "l1", "none"] = "density",
    normalize: bool = False,
) -> Chain:
    """Drop entries of each task vector at random, rescale the others, add or average them.

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
    normalize : true or false, default false
        Divide the sum by the sum of the weights.

    Deviations
    ----------
    mergekit restores the L1 norm of every tensor (`rescale` = l1; its ``rescale: false`` is
    none) and keeps everything unless told otherwise: preset ``mergekit-0.1.5``. Which entries it
    drops is left to torch, so results agree in distribution only.
    """
    combined = (mean(),) if normalize else (weigh(), sum_())
    return chain(drop(density, seed, rescale), *combined, scale(lam))
