"""One fine-tune with its intruder dimensions scaled down."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from mergebench.compute.intruders import Side
from mergebench.compute.removal import Control
from mergebench.core.params import Examples
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.deintrude import Kinds
from mergebench.merge.ops.deintrude import deintrude as deintrude_op
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2410.21228", models=(1, 1))
def deintrude(
    lam: Annotated[float, Interval(ge=0)] = 0.7,
    top: Annotated[str, Examples(("1", "all"))] = "1",
    k: Annotated[int, Interval(ge=0)] = 10,
    epsilon: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    side: Side = "left",
    control: Control = "none",
    kinds: Kinds = "linear",
) -> Chain:
    """Scale down the leading directions of one fine-tune that its base does not have.

    W becomes W0 + ΔW + (λ - 1) σ u vᵀ for the intruder dimension with the largest σ in each matrix
    that has one. ``mergebench edit deintrude`` is the same with a report of what was removed, and
    ``--then deintrude`` does it to a merged update.

    Parameters
    ----------
    lam : float, default 0.7
        What is kept of an intruder: 0 removes it, and 1 leaves everything as it is. The paper finds
        0.7 to 0.9 nearly free.
    top : text, default 1
        How many intruders of each matrix are scaled, those with the largest σ; or all.
    k : int, default 10
        Leading directions of each matrix that are looked at; 0 for all.
    epsilon : float in (0, 1], default 0.5
        A direction is an intruder where its largest |cos| with any direction of W0 is below.
    side : left or right, default left
        Output or input side.
    control : none, removed or norm, default none
        Shrink ΔW as a whole instead, in matrices with an intruder: by as much as would be removed
        (c = 1 - ‖ΔW - ΔW'‖ / ‖ΔW‖, at least 0), or to the norm that would be left.
    kinds : linear or every, default linear
        Linear layers and kernels; or every matrix, embeddings and heads too.

    Deviations
    ----------
    The paper writes signed cosines; signs of singular vectors are arbitrary, so |cos| is taken, as
    PEFT does. PEFT's ``reduce_intruder_dimension`` scales all intruders (``top=all``) by 0.75 and
    truncates ΔW to its old rank, which is lossy; here the adapter grows by the rank of the
    correction, unless ``--rank`` is given. The paper has no norm-matched control; ours is.
    """
    own = deintrude_op(
        lam=lam, top=top, k=k, epsilon=epsilon, side=side, control=control, kinds=kinds
    )
    return chain(weigh(), sum_(), own)
