"""Fisher merging: a mean weighted by how much the data of each model need its entries."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.fisher_mean import fisher_mean


@merge_method(
    paper="arXiv:2111.09832",
    space="either",
    compat={
        "official": {"floor_at": "raw", "favor": "first"},
        "plain": {"floor": 0.0, "normalize": False},
    },
)
def fisher(
    floor: Annotated[float, Ge(0)] = 1e-6,
    normalize: bool = True,
    floor_at: Literal["normalized", "raw"] = "normalized",
    favor: Literal["all", "first"] = "all",
) -> Chain:
    """Average weights by the diagonal Fisher information of each model.

    θ = Σ w_i F_i θ_i / Σ w_i F_i entry by entry. Needs a statistics file of every model:
    ``mergebench fit statistics MODEL --kind fisher --task … -o FILE``, then ``--statistics FILE``.

    Parameters
    ----------
    floor : float >= 0, default 1e-6
        Least F of an entry, so that where no model's data care for an entry it is averaged.
    normalize : true or false, default true
        Divide each F by its length over all merged tensors, as the authors' code does; without,
        the model with the largest gradients dominates.
    floor_at : normalized or raw, default normalized
        Whether the floor is for F as it is divided or as it was collected.
    favor : all or first, default all
        Whose F the floor is for: every model's, or the first one's alone.

    Deviations
    ----------
    The authors' code floors F of the first model only, as it was collected (preset ``official``,
    for which the order of models matters). A raw floor above the F of a model that fits its data
    well would make that model's share arbitrary, so here it is for normalised F of every model.
    Where all shares are zero the weighted mean is taken instead of 0/0. Tensors that no statistics
    file has are averaged, which the plan says. MergeLM adds 1e-6 and squares gradients of whole
    batches; the statistics file says how its F was collected.
    """
    return chain(fisher_mean(floor, normalize, floor_at, favor))
