"""One fine-tune or adapter with its intruder dimensions scaled down, and what that took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.core.delta import LowRank, Replacement
from mergebench.core.errors import ParameterError
from mergebench.core.schedule import Cases
from mergebench.core.selector import Selector
from mergebench.merge.outcome import Written
from mergebench.recipe import ModelRef, Recipe
from mergebench.sources.opening import open_source

#: Numbers of one direction, by what the op calls them.
_DIRECTION = {
    "index": "index",
    "cosine": "cosine",
    "bound": "bound",
    "exact": "status",
    "singular value": "sigma",
    "energy": "energy",
}


@dataclass(eq=False)
class Matrix:
    """What was found in one matrix, and what became of it.

    Attributes
    ----------
    tensor : str
    intruders : int
        Among the leading directions.
    directions : list of mappings
        Those that were scaled down: ``index``, ``sigma``, ``cosine``, ``bound``, ``status`` and
        ``energy`` (σ² / ‖W‖²).
    removed, left : float
        ``‖ΔW - ΔW'‖`` and ``‖ΔW'‖`` over ‖ΔW‖.
    energy : float
        ``1 - ‖W'‖² / ‖W‖²``.
    """

    tensor: str
    intruders: int = 0
    directions: list[dict[str, Any]] = field(default_factory=list)
    removed: float = 0.0
    left: float = 1.0
    energy: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "tensor": self.tensor,
            "intruders": self.intruders,
            "directions": self.directions,
            "removed_of_update": self.removed,
            "norm_left": self.left,
            "energy_removed": self.energy,
        }


def deintruding(
    model: str,
    base: str,
    out: str | None,
    params: Mapping[str, Any],
    *,
    lams: Sequence[float] = (0.7,),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    form: str = "auto",
    **options: Any,
) -> Recipe:
    """The recipe of a repaired model or adapter.

    Parameters
    ----------
    model, base : str
        References.
    out : str or None
        The place; several values of λ give several places below it.
    params : mapping
        Of the method ``deintrude``, without λ.
    lams : sequence of float, default (0.7,)
    include, exclude : sequences of str
        Selectors of the tensors that are looked at; all others stay as they are in the model.
        Without ``include`` these are linear layers and kernels.
    form : auto, model, lora or delta
        auto: an adapter gives an adapter, and a saved task vector a task vector.
    options
        Other fields of a recipe.

    Raises
    ------
    MergebenchError
        If the model cannot be opened, or a selector is none.
    """
    if not lams:
        raise ParameterError("deintrude: no value of lam")
    spared = [(Selector(text), 1.0) for text in exclude]
    values: list[Any] = list(lams)
    if include or spared:
        kept: list[Any] = [*spared]
        values = [
            Cases((*kept, *((Selector(text), lam) for text in include)), 1.0 if include else lam)
            for lam in lams
        ]
    if form == "auto":
        opened = open_source(model, ReadOptions(lora_alpha=options.get("lora_alpha")))
        form = _own_form(None if opened.checkpoint is not None else opened.deltas)
    return Recipe(
        models=(ModelRef(model),),
        method="deintrude",
        params={
            **params,
            "lam": tuple(values) if len(values) > 1 else values[0],
            "kinds": "every" if include else "linear",
        },
        base=base,
        form=form,
        out=out,
        **options,
    )


def _own_form(deltas: Mapping[str, Any] | None) -> str:
    if deltas is None:
        return "model"
    factored = all(isinstance(delta, (LowRank, Replacement)) for delta in deltas.values())
    return "lora" if factored else "delta"


def found_in(written: Written) -> list[Matrix]:
    """What was found and done, matrix by matrix."""
    matrices = []
    for name, readings in written.readings.items():
        each = Matrix(name)
        for reading in readings:
            value = reading.value
            match reading.what:
                case "intruders":
                    each.intruders = int(value)
                case "removed of the update":
                    each.removed = value
                case "norm left":
                    each.left = value
                case "energy removed":
                    each.energy = value
                case "index":
                    each.directions.append({"index": int(value)})
                case "exact":
                    each.directions[-1]["status"] = "exact" if value else "certified"
                case what if what in _DIRECTION:
                    each.directions[-1][_DIRECTION[what]] = value
        matrices.append(each)
    return matrices


def totals(matrices: Sequence[Matrix]) -> dict[str, Any]:
    """Over all matrices: how many, with how many intruders, and how many were scaled down."""
    return {
        "matrices": len(matrices),
        "matrices_with_intruders": sum(each.intruders > 0 for each in matrices),
        "intruders": sum(each.intruders for each in matrices),
        "scaled": sum(len(each.directions) for each in matrices),
        "exact": sum(d["status"] == "exact" for each in matrices for d in each.directions),
    }
