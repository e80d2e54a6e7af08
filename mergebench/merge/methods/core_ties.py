"""Core Space with TIES: merge LoRAs inside the spaces their factors span."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.core_space import core_space
from mergebench.merge.ops.scale import scale


@merge_method(paper="arXiv:2509.17786")
def core_ties(
    lam: float = 1.0,
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2,
    divisor: Literal["count", "none"] = "count",
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """Write all updates in bases of their joint column and row spaces, and merge by TIES.

    ΔW_i = U M_i Vᵀ is exact whatever the ranks; the M_i are trimmed, elected and averaged. Methods
    that do not depend on the basis (`tsv_merge`, `iso_c`, `iso_cts`, `cart`, `star`) are computed
    in these bases anyway when all inputs are LoRAs.

    Parameters
    ----------
    lam : float, default 1.0
        Global scale.
    density : float in (0, 1], default 0.2
        Share of the entries of each M_i kept.
    divisor : count or none, default count
        Average what agrees, or add it up.
    kernels : vector or matrix, default vector
        Kernels of convolutions are averaged, or taken as matrices.

    Deviations
    ----------
    The bases come from balanced factors, U_i√S_i and V_i√S_i of each update, so that (B, A) and
    (BM, M⁻¹A) merge alike and dense updates merge as LoRAs do; the authors' code takes them from A
    and B as stored. Entries are trimmed weight by weight. Entries that cancel stay zero. The
    option to average singular values is ``--then isotropic``. Vectors and scalars are averaged.
    Where singular values coincide the bases are not unique, and neither is the result.
    """
    return chain(core_space(density, divisor, kernels), scale(lam))
