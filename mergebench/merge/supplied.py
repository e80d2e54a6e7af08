"""Statistics put where the plan needs them: each tensor gets its own, or an op without any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mergebench.core.errors import MismatchError, ParameterError
from mergebench.merge.align import Aligned
from mergebench.merge.chains import without_collected
from mergebench.merge.collected import (
    Collected,
    check_kind,
    check_model,
    check_together,
    needed_kind,
    slices_of,
)
from mergebench.merge.op import Chain, Op
from mergebench.merge.variants import Variant
from mergebench.sources import Source


def supply(
    aligned: Aligned,
    variants: Sequence[Variant],
    files: Sequence[Collected | None],
    models: Sequence[Source],
    weights: Sequence[Any],
) -> tuple[Aligned, tuple[Variant, ...], tuple[str, ...]]:
    """Items with what was collected of them, chains for those without, and what to say of it.

    Parameters
    ----------
    aligned : Aligned
    variants : sequence of Variant
    files : sequence of Collected or None
        One per model, in the order of displacements.
    models : sequence of Source
    weights : sequence
        Of the models.

    Raises
    ------
    MergebenchError
        If statistics are missing, of another kind or model, or nobody asks for them; if only some
        files have a tensor, one has another shape, or none has any.
    """
    _check_given(variants, files, models, weights)
    given = [file for file in files if file is not None]
    items, without, op = dict(aligned.items), set[str](), None
    could = has = False
    for name, item in aligned.items.items():
        asking = _asking([each.at(name) for each in variants])
        if asking is None:
            continue
        op = asking
        assert asking.collects is not None
        shapes = asking.collects.shapes(item.site)
        found = slices_of(name, asking, given, shapes)
        could |= bool(shapes)
        has |= found is not None
        if found is None:
            without.add(name)
        else:
            items[name] = replace(item, collected=found)
    if op is None or not without:
        return replace(aligned, items=items), tuple(variants), ()
    assert op.collects is not None
    kind, other = op.collects.kind, op.collects.otherwise()
    if could and not has:
        raise MismatchError(
            f"{given[0].label}: has no {kind} of any tensor that is merged",
            fix="give the statistics of these models",
        )
    shown = ", ".join(sorted(without)[:3]) + (", …" if len(without) > 3 else "")
    verb = "tensors are" if len(without) > 1 else "tensor is"
    note = f"{len(without)} {verb} in no statistics file and {_done(other)}: {shown}"
    return (
        replace(aligned, items=items),
        tuple(_placed(v, items, without) for v in variants),
        (note,),
    )


def _check_given(
    variants: Sequence[Variant],
    files: Sequence[Collected | None],
    models: Sequence[Source],
    weights: Sequence[Any],
) -> None:
    """Refuse statistics that are missing, or of another kind or model, or that nobody asks for."""
    asked = variants[0].recipe.method or "this chain"
    wanted = [needed_kind(each.ops, each.distinct) for each in variants]
    op = next((each for each in wanted if each is not None), None)
    if op is None:
        if idle := [file.label for file in files if file is not None]:
            raise ParameterError(
                f"{asked} uses no statistics", got=idle[0], fix="leave --statistics out"
            )
        return
    assert op.collects is not None
    kind = op.collects.kind
    for file, model in zip(files, models, strict=True):
        if file is None:
            raise MismatchError(
                f"{asked} needs statistics of every model, and {model.label} has none",
                fix=f"mergebench fit statistics MODEL --kind {kind} --task … -o FILE, then "
                "--statistics FILE",
            )
        check_kind(file, kind, asked)
        check_model(file, model)
        for each in wanted:
            if each is not None:
                check_together(file, models, weights, each)


def _done(op: Op) -> str:
    return "averaged" if op.name == "mean" else f"given to {op.name}"


def _asking(chains: Sequence[Chain]) -> Op | None:
    return next((op for chain in chains for op in chain if op.collects is not None), None)


def _placed(variant: Variant, items: Any, without: set[str]) -> Variant:
    """The variant with a chain that does without statistics where there are none."""
    chains = {
        name: without_collected(variant.at(name)) if name in without else variant.at(name)
        for name in items
    }
    return replace(variant, chains=chains)
