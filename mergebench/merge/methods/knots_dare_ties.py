"""KnOTS with DARE: align LoRAs in shared left singular vectors, drop at random, then merge."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.core.params import Seed
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.knots import knots
from mergebench.merge.ops.scale import scale


@merge_method(paper="arXiv:2410.19735")
def knots_dare_ties(
    lam: float = 1.0,
    density: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    seed: Seed = 0,
    divisor: Literal["count", "none"] = "count",
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """Write all updates of a weight in shared left singular vectors, and merge by DARE-TIES.

    As `knots_ties`, with coordinates dropped at random instead of trimmed: each stays with
    probability ρ and is divided by ρ; then one sign is elected per coordinate and what agrees is
    averaged.

    Parameters
    ----------
    lam : float, default 1.0
        Global scale λ.
    density : float in (0, 1], default 0.5
        Probability ρ that a coordinate stays.
    seed : int, default 0
        Another seed drops other coordinates; see `dare` for what else they depend on.
    divisor : count or none, default count
        Average what agrees, or add it up.
    kernels : vector or matrix, default vector
        Kernels of convolutions are averaged, or taken as matrices.

    Deviations
    ----------
    Those of `knots_ties`. Coordinates are numbered by falling singular value; where singular
    values coincide, neither the basis nor what is dropped is unique.
    """
    return chain(knots(density, divisor, kernels, "random", seed), scale(lam))
