"""The outputs of one recipe: a chain, expanded parameters and a place for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergebench.core.errors import ParameterError
from mergebench.merge.method import METHODS, Method
from mergebench.merge.op import OPS, Chain, chain
from mergebench.recipe import ModelRef, OpRef, Recipe
from mergebench.sources import Source

_FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".gguf")


@dataclass(frozen=True, eq=False)
class Variant:
    """One output: its label among several, expanded parameters, chain and place."""

    label: str
    recipe: Recipe
    ops: Chain
    out: Path | None


def make_variants(recipe: Recipe) -> tuple[Method | None, tuple[Variant, ...]]:
    """The method, ``None`` for a chain written out, and one variant per combination of values.

    Raises
    ------
    ParameterError
        For unknown or missing names and values, and for places that cannot be.
    """
    method = METHODS[recipe.method] if recipe.method else None
    if method is None and not recipe.ops:
        raise ParameterError("neither a method nor ops are given", fix="add --method")
    if method is None and recipe.compat is not None:
        raise ParameterError("`compat` belongs to a method", fix="leave it out beside `ops`")
    then = [OPS[each.name](**each.params) for each in recipe.then]
    found = []
    for label, each in recipe.variants():
        if method is None:
            ops = [OPS[ref.name](**ref.params) for ref in recipe.ops]
            expanded = replace(
                each, ops=tuple(OpRef(one.name, dict(one.params)) for one in ops), params={}
            )
        else:
            params = method.expand(each.params, each.compat)
            ops = list(method.factory(**params))
            expanded = replace(each, params=params)
        refs = tuple(OpRef(one.name, dict(one.params)) for one in then)
        whole = chain(*ops, *then)
        if not any(one.spec.reduces for one in whole):
            raise ParameterError(
                "the ops leave several task vectors", fix="add a combining op such as `sum`"
            )
        out = _place(recipe.out, label)
        # The place is not part of what decides the bytes.
        found.append(Variant(label, replace(expanded, then=refs, out=None), whole, out))
    if not found:
        empty = next(key for key, value in recipe.params.items() if value in ((), []))
        raise ParameterError(f"parameter {empty!r} has an empty list of values")
    if len({str(each.out) for each in found}) < len(found) and recipe.out:
        raise ParameterError("two outputs would have the same place", fix="list each value once")
    return method, tuple(found)


def _place(out: str | None, label: str) -> Path | None:
    if out is None:
        return None
    path = Path(out).expanduser()
    if path.suffix in _FOREIGN:
        raise ParameterError(
            f"{out}: {path.suffix} is not written", fix="name a .safetensors file or a folder"
        )
    if not label:
        return path
    if path.suffix == ".safetensors":
        return path.with_name(f"{path.stem}-{label}{path.suffix}")
    return path / label


def recorded(
    variants: Sequence[Variant],
    models: Sequence[Source],
    weights: Sequence[float],
    base: Source | None,
) -> tuple[Variant, ...]:
    """Recipes as they are stored: models in canonical order, the base by its name."""
    refs = tuple(
        ModelRef(model.label, weight) for model, weight in zip(models, weights, strict=True)
    )
    place = None if base is None else base.label
    return tuple(
        replace(each, recipe=replace(each.recipe, models=refs, base=place)) for each in variants
    )


def sweeps(variants: Sequence[Variant]) -> int:
    """Passes that statistics need: one for each op that asks, shared beginnings counted once."""
    asked = {
        each.ops[: end + 1]
        for each in variants
        for end, op in enumerate(each.ops)
        if op.statistic is not None
    }
    return len(asked)
