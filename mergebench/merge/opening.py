"""Opening the inputs of a recipe, in an order of their own, and a base that they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.core.errors import MismatchError
from mergebench.core.rules import parse_weight
from mergebench.core.schedule import is_schedule
from mergebench.merge.collected import Collected, open_all
from mergebench.merge.form import form_of
from mergebench.merge.spaces import Space, space_of
from mergebench.recipe import Recipe
from mergebench.sources import Source, content
from mergebench.sources.opening import open_source, with_base


@dataclass(frozen=True, eq=False)
class Opened:
    """The inputs of a recipe.

    Attributes
    ----------
    given : tuple of Source
        Models in the order of the recipe.
    models, weights, collected : tuples
        In canonical order: by fingerprint, so that the order of the command line does not change
        a bit of the result.
    order : tuple of int
        The place in the recipe of each of ``models``.
    base : Source or None
    form : model, lora or delta
    space : weight or delta
    notes : tuple of str
    """

    given: tuple[Source, ...]
    models: tuple[Source, ...]
    weights: tuple[Any, ...]
    collected: tuple[Collected | None, ...]
    order: tuple[int, ...]
    base: Source | None
    form: str
    space: Space
    notes: tuple[str, ...] = ()


def open_inputs(
    recipe: Recipe,
    sources: Sequence[Source | None] | None,
    base: Source | None,
    statistics: Sequence[Collected | None] | None,
    *,
    stream: bool,
) -> Opened:
    """Open what a recipe names, but for what is open already.

    Raises
    ------
    MergebenchError
        For anything the user can fix.
    """
    options = ReadOptions(
        lora_alpha=recipe.lora_alpha,
        ignore_saved_base=recipe.ignore_saved_base,
        part=recipe.part,
        revisions=recipe.revisions,
        stream=stream,
    )
    notes: tuple[str, ...] = ()
    weights_given = [parse_weight(each.weight, each.path) for each in recipe.models]
    if base is None and recipe.base is not None:
        base = _open_base(recipe.base, options)
    if base is not None and base.checkpoint is not None:
        options = with_base(options, base.checkpoint)
    given = _open_models(recipe, sources, options)
    form = form_of(recipe, given, base)
    space = space_of(recipe, form, base)
    if base is None and (named := _named_base(given, form, space)) is not None:
        base = _open_base(str(named), options)
        assert base.checkpoint is not None
        notes = (f"base taken from what the inputs name: {named}",)
        # Adapters are read again, now that the names and shapes of the base are known.
        options = with_base(options, base.checkpoint)
        given = _open_models(recipe, sources, options)
        space = space_of(recipe, form, base)
    files = open_all([each.statistics for each in recipe.models], statistics)
    models, weights, order = _canonical(given, recipe, weights_given, files)
    collected = tuple(files[place] for place in order)
    return Opened(tuple(given), models, weights, collected, order, base, form, space, notes)


def _open_models(
    recipe: Recipe, given: Sequence[Source | None] | None, options: ReadOptions
) -> list[Source]:
    ready = given or [None] * len(recipe.models)
    return [
        source or open_source(each.path, options)
        for source, each in zip(ready, recipe.models, strict=True)
    ]


def _open_base(reference: str, options: ReadOptions) -> Source:
    base = open_source(reference, options)
    if base.checkpoint is None:
        raise MismatchError(f"{reference}: the base must be a checkpoint", got="an adapter")
    if base.deltas is not None:
        raise MismatchError(
            f"{reference}: the base must be a checkpoint alone",
            got="one with an adapter",
            fix=f"write it first: mergebench merge {reference} -o applied",
        )
    return base


def _named_base(models: Sequence[Source], form: str, space: str) -> Path | None:
    """A base that the inputs name and that lies on this machine."""
    wanted = form == "model" and any(model.checkpoint is None for model in models)
    wanted = wanted or (space == "delta" and any(m.checkpoint is not None for m in models))
    if not wanted:
        return None
    names = {_origin(model) for model in models}
    name = names.pop() if len(names) == 1 else None
    if not name:
        return None
    path = Path(name).expanduser()
    return path if path.is_dir() or path.is_file() else None


def _origin(model: Source) -> str | None:
    name = None
    if model.config:
        name = model.config.get("base_model_name_or_path")
    elif model.checkpoint is not None and model.checkpoint.config is not None:
        name = model.checkpoint.config.get("_name_or_path")
    return name if isinstance(name, str) else None


def _canonical(
    opened: Sequence[Source],
    recipe: Recipe,
    weights: Sequence[Any],
    files: Sequence[Collected | None] = (),
) -> tuple[tuple[Source, ...], tuple[Any, ...], tuple[int, ...]]:
    """Models and weights in an order of their own, and the place where each of them was given."""
    marks = [source.fingerprint for source in opened]
    # A fingerprint samples; models that differ elsewhere only are told apart by all they hold.
    full = [content(s) if marks.count(s.fingerprint) > 1 else "" for s in opened]
    own = [
        repr([sorted(each.to_dict().get("params", {}).items()), _of_parts(recipe, place)])
        + (file.source.fingerprint if (file := dict(enumerate(files)).get(place)) else "")
        for place, each in enumerate(recipe.models)
    ]
    keys = list(zip(marks, full, map(_rank, weights), own, strict=True))
    order = tuple(sorted(range(len(opened)), key=lambda place: (*keys[place], place)))
    return tuple(opened[i] for i in order), tuple(weights[i] for i in order), order


def _of_parts(recipe: Recipe, place: int) -> list[str]:
    """The weights of a model that are for single parts."""
    return [str(part.weights[place]) for part in recipe.parts if part.weights]


def _rank(weight: Any) -> tuple[bool, float, str]:
    """Numbers by size, before schedules."""
    plain = not is_schedule(weight)
    return (not plain, weight if plain else 0.0, "" if plain else str(weight))
