"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.scale import scale as scale_
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="https://github.com/arcee-ai/mergekit",
    space="weight",
    compat={"mergekit-0.1.5": {}},
    models=(1, 1),
    checked={"mergekit 0.1.5": "8 roundings"},
)
def passthrough(scale: float = 1.0) -> Chain:
    """Write one model, each floating-point tensor multiplied by a number.

    Parameters
    ----------
    scale : float, default 1.0
        What weights are multiplied by; of an adapter its update.

    Deviations
    ----------
    None. Integer tensors are not scaled.
    """
    return chain(weigh(), sum_(), scale_(scale))
