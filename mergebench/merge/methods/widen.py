"""WIDEN: weights disentangled into magnitudes and directions."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.disentangle import disentangle
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2408.03092", compat={"official": {"ratio": 1.0, "calibration": 1.0, "lam": 1.0}}
)
def widen(
    ratio: Annotated[float, Interval(ge=0)] = 1.0,
    calibration: float = 1.0,
    lam: float = 1.0,
) -> Chain:
    """Add task vectors, each column weighed by how far its length and direction have moved.

    θ = θ0 + λ Σ w_i (S_i^m + S_i^d)/2 ⊙ τ_i. Every column of a matrix (an input feature, or a token
    of an embedding) is a length and a direction; what each has moved by is ranked within its
    model, and the softmax of the ranks over models is its importance S. Ranks above the mean are
    set to `calibration`, so that importances need not sum up to one: what mattered to several
    models is added in full for each.

    Parameters
    ----------
    ratio : float >= 0, default 1.0
        Ranks above this many times their mean are set to `calibration`.
    calibration : float, default 1.0
        Their importance.
    lam : float, default 1.0
        Global scale λ, which the authors do not have.

    Deviations
    ----------
    Models need not share a tokenizer's order only: rows of embeddings are matched before merging.
    Entries of biases are weighed like those of norms, by |τ| as it is, without ranks, so that their
    softmax depends on the unit of the weights; kernels of convolutions like matrices of
    out × (in · ∏ kernel). The authors subtract lengths and cosines that are nearly equal in the
    dtype of the checkpoint, here both are computed from τ in float64. Columns that did not move
    have turned by exactly nothing; one of zeros is at right angles to any other, where the
    authors' code divides by zero. A single model is itself.
    """
    return chain(disentangle(ratio, calibration), weigh(), sum_(), scale(lam))
