"""TALL masks: one model per task out of one merged task vector."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.tall_mask import tall_mask
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2405.07813")
def tall_masks(mask_lam: Annotated[float, Ge(0)] = 0.4, lam: float = 1.0) -> Chain:
    """One model per task: of the sum of all task vectors, the entries that the task uses.

    θ_t = θ0 + λ · m_t ⊙ τ, with τ = Σ w_i τ_i and m_t = [|τ_t| > λ_t |τ - τ_t|]. Where no two
    tasks displace the same entry every model comes out exactly.

    Parameters
    ----------
    mask_lam : float >= 0, default 0.4
        λ_t. The authors search 0.2, 0.3, 0.4, 0.5 and 0.6 for each task on its validation data:
        a list of values gives, from one reading, every task's result with each of them.
    lam : float, default 1.0
        Global scale λ. Only masks are searched in the paper, so it is 1 there.

    Notes
    -----
    The masks can follow any method: ``-m ties -p divisor=none --then tall_mask:mask_lam=0.4`` is
    the authors' TALL masks on TIES. ``consensus_ta`` makes one model of the same masks.
    ``mergebench edit pack-tasks -m tall_masks`` writes τ and the masks alone.

    Deviations
    ----------
    Weights of models enter τ, and not the τ_t it is compared with.
    """
    return chain(weigh(), sum_(), tall_mask(mask_lam), scale(lam))
