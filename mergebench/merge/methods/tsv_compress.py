"""TSV-Compress: every task at a rank of its own, together no larger than one."""

from __future__ import annotations

from typing import Annotated, Literal

from mergebench.core.params import Examples
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.compress import compress
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2412.00081")
def tsv_compress(
    share: Annotated[str, Examples(("tasks", "0.1", "1"))] = "tasks",
    lam: float = 1.0,
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """One model per task: its leading task singular vectors, nothing of the other tasks.

    θ_t = θ0 + λ · SVD_k(τ_t) per matrix, k = ⌊r / N⌋ of N tasks and r the smaller side. With
    ``--as lora`` every result is an adapter of these ranks.

    Parameters
    ----------
    share : tasks or a number from 0 to 1, default tasks
        k is ⌊r / N⌋, as published, or ⌊share · r⌋; at least 1. A number asks for the same rank
        whatever the number of models: share=0.1 is about a tenth of a matrix.
    lam : float, default 1.0
        Global scale λ, not in the paper.
    kernels : vector or matrix, default vector
        Kernels of convolutions are kept whole, or taken as matrices.

    Deviations
    ----------
    Vectors and scalars are kept whole, per task. A weight multiplies its task vector. Every
    matrix of two dimensions is compressed; ``--include`` and ``--exclude`` leave others at the
    base. Computed in float64 by LAPACK; where singular values are apart, other LAPACKs give the
    same to 1e-5 of a tensor's largest entry.
    """
    return chain(weigh(), compress(share, kernels), scale(lam))
