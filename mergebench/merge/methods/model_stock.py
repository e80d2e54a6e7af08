"""Model Stock: between the base and the mean, by the angle of the task vectors."""

from __future__ import annotations

from typing import Literal

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.mean import mean
from mergebench.merge.ops.stock_ratio import stock_ratio


@merge_method(
    paper="arXiv:2403.19522",
    compat={"mergekit-0.1.5": {"scope": "tensor", "clamp": False}},
    checked={"mergekit 0.1.5": "8 roundings", "FusionBench 0.2.33": "5e-04"},
)
def model_stock(scope: Literal["row", "tensor"] = "tensor", clamp: bool = False) -> Chain:
    """Go from the base t of the way to the mean: θ = t · mean(θ_i) + (1 - t) θ0.

    t = N cos θ / (1 + (N - 1) cos θ), with cos θ the mean cosine between pairs of task vectors.

    Parameters
    ----------
    scope : row or tensor, default tensor
        Over what the angles are measured: each output row of a matrix, or each tensor (a layer of
        the paper).
    clamp : true or false, default false
        Keep t within 0 and 1. Otherwise task vectors that point apart lead beyond the base.

    Deviations
    ----------
    Weights, which the paper does not have, weigh the mean and not the angle. A zero task vector
    counts with a cosine of 0 to all others. Where the denominator vanishes, at
    cos θ = -1 / (N - 1), the base is left, as in mergekit 0.1.5; its ``filter_wise`` is `scope` =
    row, the last dimension. A single model is itself.
    """
    return chain(stock_ratio(scope, clamp), mean())
