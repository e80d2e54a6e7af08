"""The Karcher mean of models on the sphere."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.frechet_mean import frechet_mean


@merge_method(
    paper="doi:10.1002/cpa.3160300502",
    space="weight",
    compat={"mergekit-0.1.5": {"max_iter": 10, "tol": 1e-5}},
    checked={"mergekit 0.1.5": "8 roundings"},
)
def karcher(
    max_iter: Annotated[int, Interval(ge=1, le=1000)] = 10, tol: Annotated[float, Ge(0)] = 1e-5
) -> Chain:
    """The mean direction on the sphere times the mean length, tensor by tensor.

    The direction minimises the weighted sum of squared angles to all models; it is found by
    averaging in the tangent space and moving there, again and again.

    Parameters
    ----------
    max_iter : int in [1, 1000], default 10
        How often the mean is moved.
    tol : float >= 0, default 1e-5
        Stop where the move is shorter, in radians.

    Notes
    -----
    After H. Karcher, *Riemannian center of mass and mollifier smoothing*, Communications on Pure
    and Applied Mathematics 30, 1977; the use on models is mergekit's.

    Deviations
    ----------
    mergekit gives all models one weight; here weights are honoured, negative ones refused. Where
    directions cancel there is no mean: mergekit takes that of its first model, here the arithmetic
    mean of the weights is taken, so that the order of models is immaterial. Inner products are
    measured in float64.
    """
    return chain(frechet_mean(max_iter, tol))
