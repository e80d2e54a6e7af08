"""STAR: spectral truncation and rescale."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.combine import combine
from mergebench.merge.ops.cut_spectrum import cut_spectrum
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2502.10339")
def star(
    lam: float = 1.0,
    share: Annotated[float, Interval(gt=0, le=1)] = 0.4,
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """Cut small singular values off each task vector, restore its nuclear norm, average.

    Parameters
    ----------
    lam : float, default 1.0
        Global scale.
    share : float in (0, 1], default 0.4
        Of each matrix the fewest singular values stay whose sum reaches this share of all.
    kernels : vector or matrix, default vector
        Kernels of convolutions are averaged as they are, or taken as matrices.

    Deviations
    ----------
    A weight multiplies its task vector before the mean is taken. Computed in float64 by LAPACK;
    where singular values are apart, other LAPACKs give the same to 1e-5 of a tensor's largest
    entry.
    """
    return chain(weigh(), cut_spectrum(share, kernels), combine("mean", kernels), scale(lam))
