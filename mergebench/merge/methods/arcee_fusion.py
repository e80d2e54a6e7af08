"""Arcee Fusion: take over only what changes a model most."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.keep_important import keep_important
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="https://github.com/arcee-ai/mergekit",
    compat={"mergekit-0.1.5": {"iqr": 1.5, "lam": 1.0}},
    models=(1, 1),
    checked={"mergekit 0.1.5": "8 roundings"},
)
def arcee_fusion(iqr: Annotated[float, Ge(0)] = 1.5, lam: float = 1.0) -> Chain:
    """Move the entries of the base that matter to those of another model, and leave the rest.

    The importance of an entry is the magnitude of its change times the divergence that its row
    suffers, ``|τ| · KL(softmax(θ1) ‖ softmax(θ0))``. Entries stay in the task vector where it
    reaches the tensor's ``median + iqr · (Q3 - Q1)``.

    Parameters
    ----------
    iqr : float >= 0, default 1.5
        How many interquartile ranges above the median.
    lam : float, default 1.0
        Global scale λ.

    Deviations
    ----------
    Quartiles and median are entries of the tensor, the lower one where two are in the middle, as
    was observed of mergekit 0.1.5. They are exact here for tensors of any size; mergekit is known
    to draw a random sample above a million entries. Divergences are measured in float64, so that
    an entry next to the threshold may fall on its other side.
    """
    return chain(keep_important(iqr), weigh(), sum_(), scale(lam))
