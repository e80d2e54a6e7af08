"""Consensus task arithmetic: keep what several tasks use."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.consensus import consensus
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2405.07813")
def consensus_ta(
    k: Annotated[int, Interval(ge=0, le=10_000)] = 2,
    mask_lam: Annotated[float, Ge(0)] = 0.4,
    lam: float = 0.3,
) -> Chain:
    """Add task vectors, then drop the entries that fewer than k tasks use.

    θ = θ0 + λ · [Σ_i m_i >= k] ⊙ τ, with τ = Σ w_i τ_i and the TALL masks
    m_i = [|τ_i| > λ_t |τ - τ_i|]. Only the mask decides; what stays is not changed.

    Parameters
    ----------
    k : int, default 2
        How many tasks must use an entry. 0 keeps everything, 1 drops what no task uses, 2 also
        what a single one does.
    mask_lam : float >= 0, default 0.4
        λ_t of the masks; the authors search 0.2 to 0.6 on validation data, for each task.
    lam : float, default 0.3
        Global scale λ, searched on validation data; 0.3 suits eight tasks.

    Notes
    -----
    The mask can follow any method: ``-m ties -p divisor=none --then consensus:k=2`` is the
    authors' Consensus TIES; its λ is then one more ``--then scale:lam=0.3``.

    Deviations
    ----------
    One λ_t for all tasks. Weights of models enter τ, and not the τ_i it is compared with.
    """
    return chain(weigh(), sum_(), consensus(k, mask_lam), scale(lam))
