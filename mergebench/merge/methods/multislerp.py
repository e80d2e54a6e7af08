"""Multi-SLERP: one step of the mean on the sphere."""

from __future__ import annotations

from typing import Literal

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.tangent_mean import tangent_mean


@merge_method(
    paper="doi:10.1145/502122.502124",
    space="either",
    compat={"mergekit-0.1.5": {"tangent": "projection", "normalize": True}},
    checked={"mergekit 0.1.5": "8 roundings"},
)
def multislerp(tangent: Literal["log", "projection"] = "log", normalize: bool = True) -> Chain:
    """Average several models in the tangent space at their mean direction.

    Unit vectors are mapped into the tangent space of the sphere at their normalised weighted mean,
    averaged there, and mapped back; the length is the weighted mean length. Of task vectors where
    a base is given, of weights otherwise.

    Parameters
    ----------
    tangent : log or projection, default log
        Map by the logarithm, ``θ/sin θ · (u - cos θ · m)``, which keeps angles, or only by the
        projection ``u - cos θ · m``.
    normalize : true or false, default true
        Divide the weights by their sum.

    Notes
    -----
    One step of the averaging of S. R. Buss and J. P. Fillmore, *Spherical averages and applications
    to spherical splines and interpolation*, ACM Transactions on Graphics 20, 2001; the use on
    models is mergekit's.

    Deviations
    ----------
    mergekit maps by projection (preset ``mergekit-0.1.5``), which takes models far from the mean
    for nearer than they are. Its ``eps`` has no counterpart: zero tensors are told apart exactly.
    Where directions cancel the arithmetic mean is taken.
    """
    return chain(tangent_mean(tangent, normalize))
