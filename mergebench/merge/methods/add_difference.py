"""Add difference: A + (B - C), as users of diffusion models write it."""

from __future__ import annotations

from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain, chain
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2212.04089", models=(1, 2))
def add_difference() -> Chain:
    """Add to model A what model B has learnt since base C: θ = A + m (B - C).

    ``merge A B:0.8 --base C --method add_difference`` gives A + 0.8 (B - C): the multiplier m is
    the weight of B, and A has weight 1.

    Deviations
    ----------
    None. It is computed as C + (A - C) + m (B - C), which is task arithmetic with the weights of
    A and B; a weight of A other than 1 scales A - C.
    """
    return chain(weigh(), sum_())
