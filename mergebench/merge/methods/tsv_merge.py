"""TSV-Merge: task singular vectors without interference."""

from __future__ import annotations

from typing import Literal

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.singular_vectors import singular_vectors
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2412.00081",
    compat={
        "official": {"over": "full", "kernels": "vector"},
        "fusionbench-0.2.33": {"over": "full", "kernels": "vector"},
    },
    checked={"FusionBench 0.2.33": "1e-04"},
)
def tsv_merge(
    lam: float = 1.0,
    keep: Literal["share", "all"] = "share",
    orthogonalize: bool = True,
    over: Literal["rank", "full"] = "rank",
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """Add the leading singular triplets of all tasks, their vectors made orthogonal (TSV-M).

    Parameters
    ----------
    lam : float, default 1.0
        Global scale, the paper's α; 1 is best throughout its tables.
    keep : share or all, default share
        Of r singular values each of N tasks keeps the ⌊r / N⌋ largest, or all of them.
    orthogonalize : true or false, default true
        Replace the joined singular vectors by the nearest orthonormal ones. Without it, and with
        `keep` = all, the sum of task vectors remains; the two are the paper's ablation.
    over : rank or full, default rank
        Whether r is the dimension of the space that the task vectors span together, or the
        smaller side of the matrix. They differ for LoRAs only.
    kernels : vector or matrix, default vector
        Kernels of convolutions are averaged, as the paper has it, or taken as matrices.

    Deviations
    ----------
    Vectors and scalars are averaged. Each task keeps at least one triplet, where the authors'
    code keeps none of a matrix whose smaller side is below N. Singular values below 2⁻²⁰ of the
    largest count as zero: the authors' code gives the directions of identical or low-rank tasks
    arbitrary partners (two equal tasks of rank 1 come out once in place and once elsewhere), here
    equal directions are shared and nothing is made up. Names with ``text_projection``, which the
    authors average, are matrices like all others. Computed in float64 by LAPACK; where singular
    values are apart, other LAPACKs give the same to 1e-5 of a tensor's largest entry.
    """
    return chain(weigh(), singular_vectors(keep, orthogonalize, over, kernels), scale(lam))
