"""Twin-Merging: a shared expert and compressed exclusive ones."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.mean import mean
from mergebench.merge.ops.twin import twin
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2406.15479")
def twin_merging(
    density: Annotated[float, Interval(ge=0, le=1)] = 0.1,
    lam: float = 0.3,
    experts: Literal["apart", "combined"] = "apart",
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """One model per task, or one for fixed weights: a shared expert plus exclusive ones.

    θ* = θ0 + λ Σ τ_t and v_t = SVD_k(θ_t - θ*), k = ⌊density · r⌋ per matrix, r its smaller side.
    Apart: θ* + v_t for every task. Combined: θ* + Σ w_t v_t for the weights of the models, which
    are divided by their sum as those of a router are.

    Parameters
    ----------
    density : float in [0, 1], default 0.1
        Share of singular values that an exclusive expert keeps, at least one; 0 gives θ*, 1 every
        model as it came. The error falls with it.
    lam : float, default 0.3
        Scale λ of the shared expert.
    experts : apart or combined, default apart
        One result for each model, or one for all by the weights of the models:
        ``a:0.7 b:0.3 -p experts=combined``.
    kernels : vector or matrix, default vector
        Kernels of convolutions are kept whole, or taken as matrices.

    Notes
    -----
    The exclusive experts themselves, as adapters on the shared one, take two steps:
    ``-m task_arithmetic -p lam=0.3 -o shared``, then the same models with ``--base shared
    -m tsv_compress -p share=0.1 --as lora -o experts``.

    Deviations
    ----------
    Weights are fixed here; the paper's come from a router for every input. Apart, a weight
    multiplies its task vector. The factors of LoRAs are never decomposed one by one, as the
    authors' generative code does: ΔW is. Computed in float64 by LAPACK; where singular values are
    apart, other LAPACKs give the same to 1e-5 of a tensor's largest entry.
    """
    if experts == "combined":
        return chain(twin(density, lam, kernels), mean())
    return chain(weigh(), twin(density, lam, kernels))
