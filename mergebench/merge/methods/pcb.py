"""PCB-Merging: parameter competition balancing."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.compete import compete
from mergebench.merge.ops.scale import scale


@merge_method(
    paper="arXiv:2410.02396",
    compat={
        "official-vision": {"ratio": 0.05, "lam": 1.2},
        "official-nlp": {"ratio": 0.1, "lam": 1.0},
    },
)
def pcb(
    ratio: Annotated[float, Interval(gt=0, le=1)] = 0.1,
    lam: float = 1.0,
    variant: Literal["code", "paper"] = "code",
    clip: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0001,
    normalize: bool = True,
) -> Chain:
    """Let parameters compete within and between tasks, then average the winners by their scores.

    θ = θ0 + λ Σ w_i S_i ⊙ τ_i / Σ S_i. A score S_i is high where an entry is large in its task
    (intra-balancing) and agrees with the other tasks (inter-balancing); all but the highest share
    of each task are zero. Everything is measured over the whole model.

    Parameters
    ----------
    ratio : float in (0, 1], default 0.1
        Share of entries of each task that count.
    lam : float, default 1.0
        Global scale λ; the paper also searches one per task, which are the models' weights here.
    variant : code or paper, default code
        The authors' code: exp(N minmax(|τ̂_i|)²) · tanh(τ_i Σ_j τ_j), of which the excess over the
        lowest score that counts is normalised to [0, 1]. The paper: softmax(N norm(τ_i²)) ·
        Σ_j softmax(norm(τ_i τ_j)), masked; norm maps to [0, 1] over all entries.
    clip : float in [0, 0.5), default 0.0001
        With `variant` = code, magnitudes are clipped to their quantiles clip and 1 - clip.
    normalize : true or false, default true
        Divide by the sum of the scores, so that equal tasks give that task.

    Deviations
    ----------
    Three scripts of the authors disagree: they clip at 0.0001 or 0.01, take the raw sum
    (`normalize` = false) or the normalised one, and use a ratio of 0.05 with λ = 1.2 for vision
    (preset ``official-vision``) and 0.1 for language (``official-nlp``). tanh depends on the unit
    of the weights, so that scaled task vectors do not give a scaled result. The paper's mask
    ranks scores rounded to float32, so that those that differ by rounding alone tie, and keeps all
    that tie at the bar. Where all that count score alike, each counts in full.
    """
    return chain(compete(ratio, clip, variant, normalize), scale(lam))
