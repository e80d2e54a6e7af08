"""EMR-Merging: elect, mask, rescale."""

from __future__ import annotations

from typing import Literal

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.emr import emr as emr_
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2405.17461",
    compat={"official-nlp": {"over": "tensors"}, "fusionbench-0.2.33": {"over": "tensors"}},
    checked={"FusionBench 0.2.33": "1e-05"},
)
def emr(over: Literal["entries", "tensors"] = "entries", lam: float = 1.0) -> Chain:
    """One model per task: a task vector elected for all, masked and rescaled for each.

    θ_i = θ0 + λ · s_i · m_i ⊙ τ, with the sign of τ that of Σ τ_i (negative where that is zero),
    its magnitude the largest |τ_i| of that sign, m_i = [τ_i · τ > 0] and
    s_i = Σ |τ_i| / Σ |m_i ⊙ τ| over the whole model. Nothing is tuned. A single model comes out
    as it is; a task that agrees nowhere with τ is left at the base.

    Parameters
    ----------
    over : entries or tensors, default entries
        What counts alike in s_i: every entry, as the paper has it, or every tensor, as in the
        authors' code for language models.
    lam : float, default 1.0
        Global scale λ, not in the paper.

    Notes
    -----
    All results share τ: with N tasks they are one vector of floats, N masks of one bit per entry
    and N numbers. Each is written as a model of its own; ``mergebench edit pack-tasks`` writes
    them in that form.

    Deviations
    ----------
    A weight multiplies its task vector before the election. s_i is summed in float64.
    """
    return chain(weigh(), emr_(over), scale(lam))
