"""SCE: select, calculate, erase."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.energy_mean import energy_mean
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.select_variance import select_variance


@merge_method(
    paper="arXiv:2408.07990",
    compat={"mergekit-0.1.5": {"select_topk": 1.0, "count": "nonzero", "tie": "plus"}},
    checked={"mergekit 0.1.5": "8 roundings"},
)
def sce(
    select_topk: Annotated[float, Interval(gt=0, le=1)] = 1.0,
    lam: float = 1.0,
    count: Literal["exact", "nonzero"] = "exact",
    tie: Literal["zero", "plus", "minus"] = "zero",
) -> Chain:
    """Select what varies over models, weigh models by their energy, erase minority signs.

    Per tensor: keep the entries with the largest variance over models; give each model the weight
    η_i = Σ τ_i² / Σ_j Σ τ_j²; zero entries whose sign is not that of Σ_i τ_i; and take the mean of
    what is left, Σ η_i τ_i / Σ η_i.

    Parameters
    ----------
    select_topk : float in (0, 1], default 1.0
        Share of entries kept in each tensor, τ.
    lam : float, default 1.0
        Global scale λ.
    count : exact or nonzero, default exact
        Keep ⌊τd⌋ of d entries, earlier ones first among equals; or count in d only those entries
        in which models differ.
    tie : zero, plus or minus, default zero
        The sign where values sum to exactly zero: none, which leaves the base, positive or
        negative.

    Deviations
    ----------
    Weights, which the paper does not have, multiply η. mergekit takes the share of the entries in
    which models differ, and a positive sign where values cancel (preset ``mergekit-0.1.5``). A
    single model has no variance and is kept whole.
    """
    return chain(select_variance(select_topk, count), energy_mean(tie), scale(lam))
