"""MOS-style merging of a new adapter with earlier ones."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.blend_last import blend_last
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2412.09441")
def mos(lam: float = 1.0, m: Annotated[float, Interval(ge=0, le=1)] = 0.1) -> Chain:
    """Draw the last adapter towards the mean of those before it: (1 - m) τ_b + m · mean τ_j.

    The order is that in which the models are given: first the earlier tasks, last the new one.

    Parameters
    ----------
    lam : float, default 1.0
        Global scale.
    m : float in [0, 1], default 0.1
        Share of the earlier adapters together.

    Deviations
    ----------
    Updates ΔW are averaged, without loss, where the authors' code averages the factors and gets
    cross terms. It happens once, from the adapters as they are stored: the code blends in place
    whenever a block is evaluated, so that its adapters drift. A single adapter stays as it is.
    """
    return chain(weigh(), blend_last(m), scale(lam))
