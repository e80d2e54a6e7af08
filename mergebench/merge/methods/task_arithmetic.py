"""Task arithmetic: add, negate and combine task vectors."""

from __future__ import annotations

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.mean import mean
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2212.04089",
    compat={
        "official": {"lam": 0.3},
        "fusionbench": {"lam": 0.3},
        "mergekit-0.1.5": {"lam": 1.0},
    },
    checked={"mergekit 0.1.5": "8 roundings", "FusionBench 0.2.33": "1e-05", "PEFT 0.21": "1e-05"},
)
def task_arithmetic(lam: float = 1.0, normalize: bool = False) -> Chain:
    """Add task vectors to the base: θ = θ0 + λ · Σ w_i τ_i.

    Parameters
    ----------
    lam : float, default 1.0
        Global scale λ, called `lambda` or `lam`. The paper searches 0 to 1 in steps of 0.05 on
        validation data; 0.3 is common for eight tasks.

    normalize : true or false, default false
        Divide by the sum of the weights.

    Notes
    -----
    *Addition*: positive weights. *Negation* (forgetting): one model with a negative weight,
    ``merge toxic:-1 --base base``. *Analogy*: signed weights, ``merge c:1 b:1 a:-1``.

    Deviations
    ----------
    Tensors that only one side has are an error, not dropped with a warning.
    """
    return chain(*([mean()] if normalize else [weigh(), sum_()]), scale(lam))
