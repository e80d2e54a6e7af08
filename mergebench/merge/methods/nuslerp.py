"""NuSLERP: SLERP with weights, of weights or of task vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.slerp import slerp


@merge_method(
    paper="doi:10.1145/325334.325242",
    space="either",
    compat={"mergekit-0.1.5": {"threshold": 0.999999, "scope": "tensor"}},
    models=(1, 2),
    checked={"mergekit 0.1.5": "8 roundings"},
)
def nuslerp(
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.9995,
    scope: Literal["row", "tensor"] = "tensor",
) -> Chain:
    """SLERP of two task vectors where a base is given, of two models otherwise.

    The formula is that of ``slerp``, with t the second model's share of the weights.

    Parameters
    ----------
    threshold : float in [0, 1], default 0.9995
        Vectors whose ``|cos ω|`` is above it, so parallel and opposite ones, are interpolated
        linearly.
    scope : row or tensor, default tensor
        What counts as a vector. A row is the last dimension; a vector is one row.

    Notes
    -----
    After K. Shoemake, *Animating rotation with quaternion curves*, SIGGRAPH 1985; the use on task
    vectors is mergekit's.

    Deviations
    ----------
    mergekit interpolates linearly only between vectors that are far nearer to parallel than in its
    own SLERP (``|cos ω|`` up to 0.99999 was seen on the arc). Its ``nuslerp_flatten`` = false is
    `scope` = row; vectors along the first dimension (``nuslerp_row_wise`` = true) are not offered.
    """
    return chain(slerp(threshold, scope))
