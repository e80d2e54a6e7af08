"""Skill grafting: the few entries of one task vector that moved most."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.trim import trim
from mergebench.merge.ops.weigh import weigh


@merge_method(paper="arXiv:2302.06600", models=(1, 1))
def graft(
    density: Annotated[float, Interval(gt=0, le=1)] = 0.0001,
    lam: float = 1.0,
    count: Literal["exact", "at_least_one"] = "at_least_one",
) -> Chain:
    """Graft the entries that moved most of one fine-tune onto the base: θ = θ0 + γ ⊙ τ.

    The mask γ holds the largest magnitudes over all merged tensors: the starting mask of the paper,
    and its baseline without data. ``mergebench edit extract-sparse`` stores what is grafted.

    Parameters
    ----------
    density : float in (0, 1], default 0.0001
        Share of entries that is grafted.
    lam : float, default 1.0
        Scale of what is grafted.
    count : exact or at_least_one, default at_least_one
        Graft ⌊ρd⌋ of d entries, earlier (tensor name, index) first among equals; or at least one.

    Deviations
    ----------
    The paper then trains the mask on data of the task, as ``fit graft`` does. It leaves embeddings
    and head alone, which is ``--exclude class=embedding --exclude class=head``. The authors' code
    keeps what is strictly above the k-th magnitude, so one entry less and no ties.
    """
    return chain(trim(density, "model", count), weigh(), sum_(), scale(lam))
