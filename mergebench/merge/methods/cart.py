"""CART: centred task vectors of low rank."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.centred import centred
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2412.12153")
def cart(
    lam: float = 1.0,
    share: Annotated[float, Interval(gt=0, le=1)] = 0.08,
    over: Literal["rank", "full"] = "rank",
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """Average the models and add the leading directions in which each differs from the average.

    θ = θ̄ + λ Σ_i SVD_k(θ_i - θ̄).

    Parameters
    ----------
    lam : float, default 1.0
        Weight λ of what is added to the mean; 0 gives the mean.
    share : float in (0, 1], default 0.08
        k is this share of r singular values, at least one; 0.04 to 0.08 in the paper. 1 gives the
        mean, since the differences to it add up to zero.
    over : rank or full, default rank
        Whether r is the dimension of the space that the centred task vectors span together, or
        the smaller side of the matrix. With the latter LoRAs of lower rank than k are averaged.
    kernels : vector or matrix, default vector
        Kernels of convolutions are averaged, or taken as matrices.

    Deviations
    ----------
    A weight multiplies its task vector before the mean is taken. Vectors and scalars are averaged.
    Computed in float64 by LAPACK; where singular values are apart, other LAPACKs give the same to
    1e-5 of a tensor's largest entry.
    """
    return chain(weigh(), centred(share, lam, over, kernels))
