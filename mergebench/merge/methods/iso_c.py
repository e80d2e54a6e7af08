"""Iso-C: isotropic merging in the common subspace."""

from __future__ import annotations

from typing import Literal

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.combine import combine
from mergebench.merge.ops.isotropic import isotropic
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2502.04959",
    compat={
        "official": {"over": "full", "kernels": "vector"},
        "fusionbench-0.2.33": {"lam": 1.0, "over": "full", "kernels": "vector"},
    },
    checked={"FusionBench 0.2.33": "1e-04"},
)
def iso_c(
    lam: float = 1.0,
    over: Literal["rank", "full"] = "rank",
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """Sum the task vectors and give all singular values of each matrix their mean (Iso-C).

    Parameters
    ----------
    lam : float, default 1.0
        Global scale, the paper's α, searched on held-out data; 1.5 is common for eight tasks.
    over : rank or full, default rank
        Whether the mean is taken over the singular values that are not zero, which keeps the
        nuclear norm, or over the smaller side of the matrix. They differ for LoRAs only.
    kernels : vector or matrix, default vector
        Kernels of convolutions are averaged, as the paper has it, or taken as matrices.

    Deviations
    ----------
    Vectors and scalars are averaged. Singular values below 2⁻²⁰ of the largest count as zero and
    their directions stay zero: the authors' code fills them with σ̄ too, in directions that no task
    has and that every LAPACK chooses otherwise. Computed in float64 by LAPACK; other LAPACKs give
    the same to 1e-5 of a tensor's largest entry.
    """
    return chain(weigh(), combine("sum", kernels), isotropic(over, kernels), scale(lam))
