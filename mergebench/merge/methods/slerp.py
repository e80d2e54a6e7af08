"""SLERP: spherical linear interpolation of two models."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.slerp import slerp as slerp_


@merge_method(
    paper="doi:10.1145/325334.325242",
    space="weight",
    compat={"mergekit-0.1.5": {"threshold": 0.9995, "scope": "tensor"}},
    models=(1, 2),
    checked={"mergekit 0.1.5": "8 roundings"},
)
def slerp(
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.9995,
    scope: Literal["row", "tensor"] = "tensor",
) -> Chain:
    """Move from one model to another along the arc between their weights.

    θ = (sin((1-t)ω) θ1 + sin(tω) θ2) / sin ω, ω the angle between both tensors. The lengths are
    interpolated along with the directions, since θ1 and θ2 are not normalised. Needs no base.

    Parameters
    ----------
    threshold : float in [0, 1], default 0.9995
        Tensors whose ``|cos ω|`` is above it, so parallel and opposite ones, are interpolated
        linearly.
    scope : row or tensor, default tensor
        What counts as a vector. A row is the last dimension; a vector is one row.

    Notes
    -----
    t is the second model's share of the weights: ``merge a:0.7 b:0.3`` goes three tenths of the
    way from a to b. A single model is itself. After K. Shoemake, *Animating rotation with
    quaternion curves*, SIGGRAPH 1985.

    Deviations
    ----------
    mergekit takes ``t`` and counts it from its base model. A tensor that is zero in one model has
    no angle: here it is interpolated linearly, in mergekit as if the angle were a right one.
    """
    return chain(slerp_(threshold, scope))
