"""Magnitude pruning: keep the largest entries, then add."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.trim import trim
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:1506.02626",
    compat={"peft-0.21": {"scope": "tensor", "count": "exact"}},
    checked={"PEFT 0.21": "1e-04"},
)
def magnitude_prune(
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2,
    lam: float = 1.0,
    scope: Literal["row", "tensor", "model"] = "tensor",
    count: Literal["exact", "at_least_one"] = "exact",
) -> Chain:
    """Keep the largest entries of each task vector, then add, without rescaling.

    θ = θ0 + λ Σ w_i τ̂_i: the trimming of TIES (`ties`) without its election.

    Parameters
    ----------
    density : float in (0, 1], default 0.2
        Share of entries kept in each task vector.
    lam : float, default 1.0
        Global scale λ.
    scope : row, tensor or model, default tensor
        Over what the largest entries are counted.
    count : exact or at_least_one, default exact
        Keep ⌊ρd⌋ of d entries, earlier (tensor name, index) first among equals; or at least one
        of them.

    Deviations
    ----------
    The paper prunes weights of networks, with retraining; applied to task vectors it is PEFT's
    ``magnitude_prune_svd`` (preset ``peft-0.21``). PEFT's ``magnitude_prune`` prunes the factors
    A and B of a LoRA separately, which depends on the basis they are written in; here ΔW is.
    """
    return chain(trim(density, scope, count), weigh(), sum_(), scale(lam))
