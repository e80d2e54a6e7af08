"""A fine-tuned model and its base, taken apart for packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergebench.adapters_zoo.kinds.delta import delta_metadata
from mergebench.core.delta import Delta, Difference
from mergebench.core.tensor import Array, ArrayTensor, nbytes
from mergebench.merge.item import Item, load, opened
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.plan import Plan
from mergebench.merge.planning import make_plan
from mergebench.merge.sparse import check_extra, whole_values
from mergebench.recipe import ModelRef, Recipe
from mergebench.ship.pieces import (
    Contents,
    Piece,
    Read,
    check_updates,
    displacement_piece,
    exact_piece,
)
from mergebench.sources import Applied


def of_model(
    model: str,
    base: str,
    *,
    whole: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_base_mismatch: bool = False,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
) -> Contents:
    """The task vector ``model - base``, checked as a merge checks it; no entry is held.

    Parameters
    ----------
    model, base : str
        References, as of merges.
    whole : sequence of str
        Selectors of tensors that are stored as they are, as new values: heads.
    include, exclude : sequence of str
        Selectors of what takes part.
    allow_base_mismatch : bool
    memory : int, bytes
    workers : int, optional

    Raises
    ------
    MergebenchError
        For anything the user can fix.
    """
    recipe = Recipe(
        models=(ModelRef(model),),
        base=base,
        method="task_arithmetic",
        form="delta",
        include=tuple(include),
        exclude=(*exclude, *whole),
        on_mismatch="error",
        allow_base_mismatch=allow_base_mismatch,
    )
    plan = make_plan(recipe, memory=memory, workers=workers)
    kept = whole_values(model, whole)
    check_extra(model, plan, kept, exclude)
    pieces: dict[str, Piece] = {}
    deltas: dict[str, Delta] = {}
    stored = 0
    for name, item in plan.aligned.items.items():
        delta = item.deltas[0]
        if delta is None:
            continue
        for each in (name, *plan.aligned.twins.get(name, ())):
            pieces[each] = replace(displacement_piece(each, delta, item.dtype), read=_reader(item))
            deltas[each] = delta
        stored += nbytes(_dtype(item, delta), delta.shape)
    check_updates(model, pieces)
    for spec in plan.package.specs:
        if (copied := plan.aligned.copies.get(spec.name)) is not None:
            pieces[spec.name] = exact_piece(spec.name, copied)
            stored += nbytes(copied.dtype, copied.shape)
    for name, array in kept.items():
        pieces[name] = exact_piece(name, ArrayTensor(array))
        stored += array.nbytes
    replaced = [name for name, piece in pieces.items() if piece.exact]
    metadata = delta_metadata(_identity(plan), replaced=replaced)
    return Contents(model, pieces, {}, metadata, stored, plan.notes, deltas)


def _identity(plan: Plan) -> dict[str, str]:
    assert plan.base is not None
    return {"fingerprint": plan.base.fingerprint, "path": plan.base.label}


def _dtype(item: Item, delta: Delta) -> str:
    """What the fine-tuned weight is stored in, or would be on its base."""
    if isinstance(delta, Difference) and not isinstance(delta.finetuned, Applied):
        return delta.finetuned.dtype
    return item.origin.dtype if item.origin is not None else "F32"


def _reader(item: Item) -> Read:
    """Entries of an item's displacement; NaN and infinity are refused, and named."""
    ready: list[Item] = []

    def read(start: int, stop: int) -> Array:
        # Factors are multiplied out piece by piece, and read once.
        if not ready:
            ready.append(opened(item))
        values: Array = load(ready[0], start, stop)[0][0]
        return values

    return read
