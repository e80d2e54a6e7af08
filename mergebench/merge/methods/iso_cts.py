"""Iso-CTS: isotropic merging in common and task-specific subspaces."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.subspaces import subspaces
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2502.04959",
    compat={
        "official": {"over": "full", "kernels": "vector"},
        "fusionbench-0.2.33": {"lam": 1.0, "over": "full", "kernels": "vector"},
    },
    checked={"FusionBench 0.2.33": "1e-04"},
)
def iso_cts(
    lam: float = 1.0,
    common: Annotated[float, Interval(ge=0, le=1)] = 0.8,
    over: Literal["rank", "full"] = "rank",
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """Iso-C in the leading directions of the sum, joined by directions of each task (Iso-CTS).

    Parameters
    ----------
    lam : float, default 1.0
        Global scale, the paper's α, searched on held-out data.
    common : float in [0, 1], default 0.8
        Share k / r of directions that come from the sum; r - k, rounded to a multiple of the
        number of tasks, come from what the tasks have beside those, evenly. 1 gives Iso-C.
    over : rank or full, default rank
        Whether r is the dimension of the space that the task vectors span together and the mean
        is taken over singular values that are not zero; or both over the smaller side of the
        matrix. They differ for LoRAs only.
    kernels : vector or matrix, default vector
        Kernels of convolutions are averaged, as the paper has it, or taken as matrices.

    Deviations
    ----------
    Vectors and scalars are averaged. Tasks are projected off the common left singular vectors
    only, as in the authors' code. Directions without a singular value (below 2⁻²⁰ of the largest)
    are left out, where the authors' code takes arbitrary ones. Computed in float64 by LAPACK;
    where singular values are apart, other LAPACKs give the same to 1e-5 of a tensor's largest
    entry.
    """
    return chain(weigh(), subspaces(common, over, kernels), scale(lam))
