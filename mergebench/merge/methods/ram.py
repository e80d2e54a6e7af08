"""RAM: keep what one model alone has changed, average what overlaps."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.disjoint_mean import disjoint_mean
from mergebench.merge.ops.drop_small import drop_small
from mergebench.merge.ops.scale import scale


@merge_method(
    paper="arXiv:2601.13572",
    compat={"mergekit-0.1.5": {"epsilon": 1e-5, "lam": 1.0}},
    checked={"mergekit 0.1.5": "8 roundings"},
)
def ram(epsilon: Annotated[float, Ge(0)] = 1e-5, lam: float = 1.0) -> Chain:
    """Reinforced agent merging: average overlapping changes, keep unique ones whole.

    An entry of a task vector counts as changed where its magnitude is above ε. Where several
    models have changed an entry, their mean is taken; where one has, its value is kept, so that
    sparse updates of different tasks are not diluted.

    Parameters
    ----------
    epsilon : float >= 0, default 1e-5
        Magnitudes up to it are no change.
    lam : float, default 1.0
        Global scale λ.

    Deviations
    ----------
    Weights, which the method does not have, multiply the task vectors; the mean divides by the
    number of models.
    """
    return chain(drop_small(epsilon), disjoint_mean("count"), scale(lam))
