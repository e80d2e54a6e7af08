"""Half fine-tuning after the fact: reset half of a fine-tuned model."""

from __future__ import annotations

from mergebench.core.params import Seed
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.reset_half import reset_half
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2404.18466", models=(1, 1))
def hft(lam: float = 1.0, seed: Seed = 0) -> Chain:
    """Reset a random half of one fine-tune's modules to the base (half reset).

    Per block two of four attention matrices, one of two norms, and of three feed-forward matrices
    two in a random half of the blocks and one in the others; embeddings, head and what else is
    outside of numbered blocks stay fine-tuned.

    Parameters
    ----------
    lam : float, default 1.0
        Scale of the task vector where it stays.
    seed : int, default 0
        Draws the half: another seed for another round of fine-tuning. ``mergebench diff`` shows
        what it has drawn.

    Notes
    -----
    The paper found the half reset of a chat model to bring back what it had forgotten, and trains
    with half of the parameters frozen, drawn anew for every round. After any other method:
    ``--then reset_half:seed=3``. An adapter stays an adapter.

    Deviations
    ----------
    Modules are counted as the names of each block give them, whatever their number: of n in a
    category ⌊n / 2⌋ are reset, and where n is odd, one more in ⌊L / 2⌋ of the L blocks. Biases go
    with their weights. Of adapters only the modules they have are counted, unless there is a base.
    """
    return chain(weigh(), sum_(), scale(lam), reset_half(seed))
