"""aTLAS × K: task vectors of which random parts have coefficients of their own."""

from __future__ import annotations

from typing import Annotated

from mergebench.core.params import Examples, Seed
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.scale_parts import scale_parts
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2407.02880")
def atlas(
    coefficients: Annotated[str, Examples(("1", "1/0.25", "0.5/-0.25/0/1.5"))] = "1",
    seed: Seed = 0,
) -> Chain:
    """Add task vectors whose random parts have coefficients of their own: what fit atlas learns.

    θ_j = θ0_j + Σ_i w_i (Σ_k λ_ijk m_jk) ⊙ τ_ij, where the masks m_j1 … m_jK split tensor j.

    Parameters
    ----------
    coefficients : text, default 1
        K numbers with slashes between them, one per part; `fit atlas --parts K` writes them for
        every model and tensor.
    seed : int, default 0
        Another seed draws another partition.

    Notes
    -----
    With a single part this is task arithmetic with weights by tensor, which is what `fit atlas`
    writes then.

    Deviations
    ----------
    The authors draw masks by shape, so that tensors of one shape share a partition, and split
    matrices alone; here each tensor has its own, drawn from its name, and none is left out.
    """
    return chain(scale_parts(coefficients, seed), weigh(), sum_())
