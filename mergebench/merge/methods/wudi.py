"""WUDI-Merging: data-free merging guided by the task vectors themselves."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.descend_wudi import descend_wudi
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="arXiv:2503.08099",
    compat={
        "official": {"solver": "steps", "steps": 300, "rate": 1e-5},
        "fusionbench-0.2.33": {"solver": "steps", "steps": 400, "rate": 1e-5},
    },
    checked={"FusionBench 0.2.33": "1e-04"},
)
def wudi(
    lam: float = 1.0,
    solver: Literal["steps", "exact"] = "steps",
    steps: Annotated[int, Ge(1)] = 300,
    rate: Annotated[float, Gt(0)] = 1e-5,
    kernels: Literal["vector", "matrix"] = "vector",
) -> Chain:
    """Take the rows of each task vector for its inputs, and minimise what the merge does to them.

    From the sum on, Σ_i ‖(τ - τ_i) τ_iᵀ‖² / ‖τ_i‖² is reduced for every matrix.

    Parameters
    ----------
    lam : float, default 1.0
        Global scale λ.
    solver : steps or exact, default steps
        The paper's steps of Adam, or the minimum nearest to the sum in closed form. Stopping early
        regularises: the minimum is another model than the published one.
    steps : int >= 1, default 300
        Steps of Adam; 400 in FusionBench.
    rate : float > 0, default 1e-5
        Learning rate. It is absolute: task vectors of other sizes are moved by another share.
    kernels : vector or matrix, default vector
        Kernels of convolutions are averaged, or taken as matrices.

    Notes
    -----
    Fragile where the norms of the task vectors differ: 85.5 % to 49.2 % in one report. The plan
    warns above a ratio of two.

    Deviations
    ----------
    Every matrix is optimised and everything else averaged, as in FusionBench; the authors leave
    all but the attention and MLP weights of CLIP at the base. Task vectors of zero are left out.
    ``exact`` is ours. Gradients are in closed form and in float64, so that single steps of Adam
    differ from those of float32.
    """
    return chain(weigh(), descend_wudi(solver, steps, rate, kernels), scale(lam))
