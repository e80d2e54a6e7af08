"""Model soups: weighted means and sums of weights."""

from __future__ import annotations

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.mean import mean
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2203.05482",
    space="weight",
    compat={
        "mergekit-0.1.5": {"normalize": True},
        "fedex-lora": {"normalize": True},
        "ffa-lora": {"normalize": True},
        "mhr-mu": {"normalize": True},
    },
    checked={"mergekit 0.1.5": "8 roundings"},
)
def linear(normalize: bool = True) -> Chain:
    """Average the weights of several fine-tunes: uniform and weighted soups, WiSE-FT.

    θ = Σ w_i θ_i / Σ w_i. Needs no base; every model's weight is 1 unless given.

    Parameters
    ----------
    normalize : true or false, default true
        Divide by the sum of the weights. Without it the sum itself is taken.

    Notes
    -----
    *Uniform soup* (section 3 of the paper): all weights equal. *WiSE-FT* (arXiv:2109.01903):
    the base and one fine-tune with weights 1 - α and α, ``merge base:0.5 tuned:0.5``.

    *Federated LoRA*: given adapters, the mean is that of their updates B A, without loss, weighted
    by clients' shares. That is what FedEx-LoRA (arXiv:2410.09432) reaches by adding the residual
    mean(BA) - mean(B) mean(A) to the base, and FFA-LoRA (arXiv:2403.12313) by freezing A (presets
    ``fedex-lora``, ``ffa-lora``). *MHR-μ* (arXiv:2211.03831) drops routing and goes on training
    from the uniform mean of its adapters (preset ``mhr-mu``; of heads, which are slices of factors,
    the mean is the same). The mean of factors alone, as FedAvg and MHR's code take it, has cross
    terms B_i A_j and is not offered. A new adapter averaged with earlier ones: method ``mos``.

    Deviations
    ----------
    None from the paper. Integer tensors are taken from the base (without one, from the inputs,
    which must agree) instead of being averaged.
    """
    return chain(mean()) if normalize else chain(weigh(), sum_())
