"""Orthogonal adaptation after training: project task vectors apart, then add them."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.project_rows import project_rows
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2312.02432")
def orthogonal(
    lam: float = 1.0,
    variant: Literal["sequential", "joint"] = "sequential",
    claim: Annotated[float, Interval(gt=0, le=1)] = 1.0,
    kernels: Literal["vector", "matrix"] = "matrix",
) -> Chain:
    """Project task vectors off each other's row spaces, then add them: no crosstalk.

    Inputs in the row space of one projected update do not excite another, so that the sum does to
    them what that update alone does. Retained energy of each model and crosstalk of each pair,
    before and after, are reported for every weight.

    Parameters
    ----------
    lam : float, default 1.0
        Global scale λ; the paper merges with 0.6.
    variant : sequential or joint, default sequential
        sequential: the first model stays whole, each further one loses what lies in the row spaces
        of those before it. The order is that in which the models are given, and it decides the
        result. joint: all give way alike, whatever the order, each to its share of the nearest
        orthonormal bases (polar factor).
    claim : float in (0, 1], default 1.0
        A model claims the fewest leading row directions that hold this share of its energy (squared
        singular values). Full fine-tunes claim every direction at 1, which leaves nothing to
        whoever comes second: give 0.9 or less for them.
    kernels : vector or matrix, default matrix
        Kernels of convolutions are added as they are, or projected as out × (in · kernel).

    Notes
    -----
    Adapters *trained* apart, on slices of ``mergebench make-basis``, need no projection:
    ``task_arithmetic`` adds them without crosstalk.

    Deviations
    ----------
    This is ours. The paper trains adapters in orthogonal row spaces, and its authors say that
    existing LoRAs cannot be made orthogonal afterwards: projection loses what the report calls
    energy, and training would not have. A direction that several models claim whole is the first
    one's in the sequential variant; in the joint one it is shared out (equal task vectors come out
    as their mean), and crosstalk stays there. Vectors and scalars are added up. Embeddings are
    taken as stored, token × width. Computed in float64 by LAPACK; where singular values are apart,
    other LAPACKs give the same to 1e-5 of a tensor's largest entry.
    """
    return chain(weigh(), project_rows(variant, claim, kernels), sum_(), scale(lam))
