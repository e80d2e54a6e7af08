"""KnOTS with TIES: align LoRAs in shared left singular vectors, then merge."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.knots import knots
from mergebench.merge.ops.scale import scale


@merge_method(
    paper="arXiv:2410.19735", compat={"official": {"lam": 0.6}, "fusionbench-0.2.33": {"lam": 0.6}}
)
def knots_ties(
    lam: float = 1.0,
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2,
    divisor: Literal["count", "none"] = "count",
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """Write all updates of a weight in the left singular vectors they share, and merge by TIES.

    With [ΔW_1 … ΔW_N] = U Σ [V_1ᵀ … V_Nᵀ] the coordinates Σ V_iᵀ = Uᵀ ΔW_i are trimmed, elected
    and averaged.

    Parameters
    ----------
    lam : float, default 1.0
        Global scale; the authors search it around 0.6.
    density : float in (0, 1], default 0.2
        Share of coordinates kept in each task vector.
    divisor : count or none, default count
        Average what agrees, or add it up.
    kernels : vector or matrix, default vector
        Kernels of convolutions are averaged, or taken as matrices.

    Deviations
    ----------
    Coordinates are trimmed weight by weight; the authors' code trims them over all weights
    together, and one more. Singular values below 2⁻²⁰ of the largest are dropped, in the authors'
    code those below 10⁻⁵. Coordinates that cancel stay zero: the authors' majority of signs
    depends on the signs that LAPACK gives singular vectors. Each weight multiplies its own model;
    the authors' code applies the first one to all. Vectors and scalars are averaged. Where
    singular values coincide the basis is not unique, and neither is the result.
    """
    return chain(knots(density, divisor, kernels), scale(lam))
