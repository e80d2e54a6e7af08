"""RAM+: RAM with unique changes strengthened by how much a model overlaps with others."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.disjoint_mean import disjoint_mean
from mergebench.merge.ops.drop_small import drop_small
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.scale_unique import scale_unique


@merge_method(
    paper="arXiv:2601.13572",
    compat={"mergekit-0.1.5": {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2, "scope": "tensor"}},
    checked={"mergekit 0.1.5": "8 roundings"},
)
def ramplus_tl(
    epsilon: Annotated[float, Ge(0)] = 1e-5,
    r: Annotated[float, Ge(0)] = 0.1,
    alpha: Annotated[float, Ge(0)] = 0.2,
    lam: float = 1.0,
    scope: Literal["tensor", "model"] = "tensor",
) -> Chain:
    """RAM with unique changes scaled by 1 + r · min(ρ_i, α), per tensor.

    ρ_i is the number of changes that model i shares with others over the number it has alone.

    Parameters
    ----------
    epsilon : float >= 0, default 1e-5
        Magnitudes up to it are no change.
    r : float >= 0, default 0.1
        Strength of the scaling.
    alpha : float >= 0, default 0.2
        Largest ratio ρ that counts.
    lam : float, default 1.0
        Global scale λ.
    scope : tensor or model, default tensor
        Over what changes are counted.

    Deviations
    ----------
    Weights, which the method does not have, multiply the task vectors; the mean divides by the
    number of models.
    """
    return chain(
        drop_small(epsilon), scale_unique(r, alpha, scope), disjoint_mean("count"), scale(lam)
    )
