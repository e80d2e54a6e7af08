"""DARE: drop entries at random, rescale the others, then add."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.core.params import Seed
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.drop import drop
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2311.03099")
def dare(
    density: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    lam: float = 1.0,
    seed: Seed = 0,
    rescale: Literal["density", "l1", "none"] = "density",
) -> Chain:
    """Drop entries of each task vector at random, rescale the others, then add.

    Each entry stays with probability ρ = 1 - p and is divided by ρ: θ = θ0 + λ Σ w_i m_i ⊙ τ_i / ρ
    (section 3 of the paper, with task arithmetic). `dare_linear` can average instead, and
    `dare_ties` elects signs.

    Parameters
    ----------
    density : float in (0, 1], default 0.5
        Probability ρ that an entry stays. The paper's drop rate is p = 1 - ρ: up to 0.9 or 0.99
        where fine-tuning moved little, less where it moved much.
    lam : float, default 1.0
        Global scale λ.
    seed : int, default 0
        Another seed drops other entries.
    rescale : density, l1 or none, default density
        Divide by ρ as the paper does; restore the L1 norm of each tensor; or do not rescale.

    Notes
    -----
    Numbers come from a counter (SplitMix64) keyed by seed, tensor name, content of the model and
    index: no order, thread count or tile size changes them, and a model given twice is drawn for
    twice. The key follows a model's content as stored: a copy in another dtype, or the dense
    product of a LoRA, is drawn for anew.

    Deviations
    ----------
    The paper leaves the drop rate open. mergekit restores the L1 norm of every tensor
    (`rescale` = l1), which is biased where few entries carry a tensor; see `dare_linear`. PEFT
    masks the factors A and B of a LoRA separately; here the update BA is masked.
    """
    return chain(drop(density, seed, rescale), weigh(), sum_(), scale(lam))
