"""LiNeS: scale layers linearly with their depth."""

from __future__ import annotations

from typing import Annotated

from mergebench.core.params import Examples
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.lines import lines as scale_by_depth
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2410.17146")
def lines(
    beta: float = 0.5,
    alpha: Annotated[str, Examples(("norms", "rest", "0.25"))] = "norms",
    lam: float = 1.0,
) -> Chain:
    """Add task vectors, then scale every layer by its depth: shallow layers move least.

    The sum Σ w_i τ_i is multiplied by α + β · l/(L - 1) in block l of L, by α + β if L = 1, and by
    α outside of numbered blocks: embeddings, but also the final norm and the output projection.
    Any other method is scaled alike by ``--then lines:beta=0.5``.

    Parameters
    ----------
    beta : float, default 0.5
        What the last block has more than the first. The authors search 0.1 to 1 in steps of 0.1
        for sums of task vectors, and up to 1.5 after TIES.
    alpha : norms, rest or a number, default norms
        The factor of the first block. norms, for several tasks: α = (‖Σ τ_i‖₁ / ‖merged‖₁) / N
        with norms over all merged tensors, which is 1 / N here. rest, for a single task:
        α = 1 - β.
    lam : float, default 1.0
        Global scale λ, applied last.

    Notes
    -----
    *Single task* (section 4 of the paper): ``merge ft --base base -m lines -p alpha=rest
    -p beta=0.7`` keeps most of the base's abilities in shallow layers. *Soups*: weights of 1 / N
    and ``alpha=0.5``. Classification heads are not merged in the paper: ``--exclude class=head``.

    Deviations
    ----------
    Blocks are found by a pattern that knows the usual containers and can be replaced
    (``--block-pattern``); the authors look for ``.l.`` anywhere in a name. Depth counts anew in
    every stack: encoder and decoder, U-Net stages, vision and text towers. Weights of models
    enter the merged sum, not ‖Σ τ_i‖₁. A merger's own λ belongs after this op: where it comes
    before, norms take it back from α, but not from β.
    """
    return chain(weigh(), sum_(), scale_by_depth(beta, alpha), scale(lam))
