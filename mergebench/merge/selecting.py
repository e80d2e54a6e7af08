"""Which tensors are merged, and what differs between them: filters, weights, chains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergebench.checkpoints.layout import Checkpoint
from mergebench.core.errors import MismatchError, ParameterError, did_you_mean
from mergebench.core.schedule import is_schedule, names, selectors, value_at
from mergebench.core.site import Site, make_sites, parse_pattern
from mergebench.core.tensor import Tensor
from mergebench.merge.align import Aligned
from mergebench.merge.chains import check_models, coefficients, is_linear, needs_base
from mergebench.merge.item import Item
from mergebench.merge.mismatch import Evened
from mergebench.merge.op import Chain
from mergebench.merge.partition import assign, check_matches, selected, spelled
from mergebench.merge.variants import Variant, build
from mergebench.recipe import Recipe
from mergebench.sources import Source

#: Why a tensor that no filter selects is copied.
UNSELECTED = "not selected"


@dataclass(frozen=True, eq=False)
class Selected:
    """Inputs as the filters leave them.

    Attributes
    ----------
    models : tuple of Source
        Without displacements of tensors that are not selected.
    shapes : mapping of tensor name to shape
        Of all inputs, whether selected or not.
    apart : frozenset of tensor names
        Not selected.
    parts : mapping of tensor name to int
        Which part of the recipe a tensor belongs to, counted from 0; without those of none.
    """

    models: tuple[Source, ...]
    shapes: Mapping[str, tuple[int, ...]]
    apart: frozenset[str] = frozenset()
    parts: Mapping[str, int] = field(default_factory=dict)


def select(recipe: Recipe, models: Sequence[Source], base: Source | None) -> Selected:
    """Take the tensors that the filters do not select out of the inputs.

    So are tensors of no part, where nothing says how else they are merged. Full checkpoints get
    the base's tensors in their place, so that nothing downstream needs to know of filters.

    Raises
    ------
    ParameterError
        If a selector is none or matches no tensor, if nothing is left to merge, or if the block
        pattern is none or is found nowhere.
    MismatchError
        If full checkpoints are to be merged without a base to take the other tensors from.
    """
    shapes, pattern = _shapes(models, base), parse_pattern(recipe.block_pattern)
    if recipe.block_pattern is not None and not any(map(pattern.search, shapes)):
        raise ParameterError(
            "block pattern: is found in no tensor name",
            got=recipe.block_pattern,
            fix="`mergebench inspect --tensors` lists the names",
        )
    if not recipe.include and not recipe.exclude and not recipe.parts:
        return Selected(tuple(models), shapes)
    sites, tied = make_sites(shapes, pattern=pattern), list(_tied(models, base))
    chosen = selected(sites, tied, recipe.include, recipe.exclude)
    parts = assign(recipe, sites, tied)
    if not recipe.method and not recipe.ops:
        chosen &= parts.keys()
    if chosen == set(sites):
        return Selected(tuple(models), shapes, parts=parts)
    if not chosen:
        raise ParameterError(
            "include and exclude leave nothing to merge",
            got=f"{len(sites)} tensors, all excluded",
            fix="relax one of them",
        )
    under = None if base is None else base.checkpoint
    for model in models:
        if model.checkpoint is not None and under is None:
            raise MismatchError(
                f"{model.label}: tensors that are not selected come from the base, and none is "
                "given",
                fix="add --base with the model to take them from",
            )
    apart = frozenset(sites) - chosen
    left = tuple(_without(model, apart, under) for model in models)
    return Selected(left, shapes, apart, parts)


def _shapes(models: Sequence[Source], base: Source | None) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of all inputs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for source in (*([base] if base is not None else []), *models):
        if source.checkpoint is not None:
            for name, tensor in source.checkpoint.tensors.items():
                shapes.setdefault(name, tuple(tensor.shape))
        for name, delta in (source.deltas or {}).items():
            shapes.setdefault(name, delta.shape)
    return shapes


def _tied(models: Sequence[Source], base: Source | None) -> Iterator[set[str]]:
    for source in (*([base] if base is not None else []), *models):
        if source.checkpoint is not None:
            for alias, origin in source.checkpoint.aliases.items():
                yield {alias, origin}


def _without(model: Source, apart: frozenset[str], base: Checkpoint | None) -> Source:
    deltas = model.deltas
    if deltas is not None:
        kept = {name: delta for name, delta in deltas.items() if name not in apart}
        deltas = replace(deltas, deltas=kept)
    own = model.checkpoint
    if own is not None and base is not None:
        # A tied tensor is merged once, under the name of its source.
        tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in own.tensors.items()
            if own.aliases.get(name, name) not in apart
        }
        tensors |= {
            name: tensor
            for name, tensor in base.tensors.items()
            if base.aliases.get(name, name) in apart
        }
        aliases = {name: source for name, source in own.aliases.items() if source not in apart}
        aliases |= {name: source for name, source in base.aliases.items() if source in apart}
        own = replace(own, tensors=tensors, aliases=aliases)
    return replace(model, checkpoint=own, deltas=deltas)


def place(
    aligned: Aligned,
    variants: Sequence[Variant],
    weights: Sequence[Any],
    chosen: Selected,
    evened: Evened,
) -> tuple[Aligned, tuple[Variant, ...]]:
    """Give every merged tensor its weights and its chains.

    Parameters
    ----------
    aligned : Aligned
    variants : sequence of Variant
    weights : sequence of float, Gradient or Cases
        Of the models, in the order of their displacements.
    chosen : Selected
        As :func:`select` returned it.
    evened : Evened
        Models that take no part in a tensor, and tensors beyond those that are merged.

    Raises
    ------
    ParameterError
        If an op cannot work on a tensor, a selector matches no merged tensor, a threshold over the
        whole model differs between tensors, or weights cannot be normalised.
    """
    apart, parts = chosen.apart, chosen.parts
    items = {
        name: _weighed(item, weights, variants[0].recipe, parts.get(name))
        for name, item in aligned.items.items()
    }
    sites = [item.site for item in items.values()]
    more = make_sites({name: t.shape for name, (t, _) in evened.added.items()}).values()
    _check_schedules(variants, weights, [*sites, *more], parts)
    for name, positions in evened.muted.items():
        if name in items:
            found = enumerate(items[name].weights)
            muted = tuple(0.0 if place in positions else weight for place, weight in found)
            items[name] = replace(items[name], weights=muted)
    if apart and not items and not evened.added:
        raise ParameterError(
            "include and exclude leave nothing to merge",
            got="no selected tensor that an input changes",
            fix="relax one of them",
        )
    placed = tuple(_placed(each, sites, parts) for each in variants)
    for each in placed:
        for site in sites:
            for op in each.at(site.name):
                op.check(site)
        _check_thresholds(each, items)
        _check_weights(each, items)
    reasons = {
        name: UNSELECTED if name in apart else reason for name, reason in aligned.reasons.items()
    }
    return replace(aligned, items=items, reasons=reasons), placed


def _scheduled(recipe: Recipe) -> Iterator[tuple[str, Any, int | None]]:
    """``(parameter, value, part)`` wherever a value differs between tensors."""
    own = [*(ref.params for ref in recipe.models), *(r.params for r in (*recipe.ops, *recipe.then))]
    given: list[tuple[Mapping[str, Any], int | None]] = [
        *((params, None) for params in (recipe.params, *own)),
        *(
            (params, number)
            for number, part in enumerate(recipe.parts)
            for params in (part.params, *(ref.params for ref in (*part.ops, *part.then)))
        ),
    ]
    for params, number in given:
        for name, value in params.items():
            if is_schedule(value):
                yield name, value, number


def _check_schedules(
    variants: Sequence[Variant],
    weights: Sequence[Any],
    sites: Sequence[Site],
    parts: Mapping[str, int],
) -> None:
    """Every selector must match a tensor that its value could be for."""
    recipe = variants[0].recipe
    found = [each for variant in variants for each in _scheduled(variant.recipe)]
    for place, part in enumerate(recipe.parts):
        found += [("weight", weight, place) for weight in part.weights]
    for what, value, number in found:
        within = [site for site in sites if parts.get(site.name) == number]
        where = what if number is None else f"{spelled(recipe, number)}: {what}"
        for selector in selectors(value):
            check_matches(f"{where}: {selector}", selector, within)
        _check_names(where, value, within)
    for weight in weights:
        for selector in selectors(weight):
            check_matches(f"weight: {selector}", selector, sites)
        _check_names("weight", weight, sites)


def check_heard(aligned: Aligned, variants: Sequence[Variant], chosen: Selected) -> Aligned:
    """What is given, if some op hears of every parameter and every part.

    Buffers are taken out of what is merged after the rules were placed, and tensors that one model
    alone has are never given to a method: weights decide of them, and no parameter does.

    Parameters
    ----------
    aligned : Aligned
        Without buffers.
    variants : sequence of Variant
    chosen : Selected
        As :func:`select` returned it.

    Raises
    ------
    ParameterError
        For one that selects only what no method is given.
    """
    recipe = variants[0].recipe
    merged = [item.site for item in aligned.items.values()]
    shapes = {
        name: tuple(t.shape) for name, t in aligned.copies.items() if name not in chosen.apart
    }
    copied = make_sites(shapes, pattern=parse_pattern(recipe.block_pattern)).values()
    for what, value, number in (each for v in variants for each in _scheduled(v.recipe)):
        own = [site for site in merged if chosen.parts.get(site.name) == number]
        left = [site for site in copied if chosen.parts.get(site.name) == number]
        where = what if number is None else f"{spelled(recipe, number)}: {what}"
        for selector in selectors(value):
            if not any(map(selector.matches, own)):
                _refuse_unheard(f"{where}: {selector}", filter(selector.matches, left), aligned)
    for number, part in enumerate(recipe.parts):
        if not part.weights and number not in (chosen.parts.get(site.name) for site in merged):
            mine = (site for site in copied if chosen.parts.get(site.name) == number)
            _refuse_unheard(spelled(recipe, number), mine, aligned)
    return aligned


def _refuse_unheard(what: str, sites: Iterable[Site], aligned: Aligned) -> None:
    names = sorted(site.name for site in sites)
    if names:
        raise ParameterError(
            f"{what} selects only tensors that no method is given",
            got=f"{names[0]}: {aligned.reasons[names[0]]}",
            fix="leave it out; where models are averaged, weight=1/0 says whose values are taken",
        )


def _check_names(what: str, value: Any, sites: Sequence[Site]) -> None:
    """Every tensor that a value names must be one that is merged."""
    given = names(value)
    known = {site.name for site in sites} if given else set()
    if missing := [name for name in given if name not in known]:
        raise ParameterError(
            f"{what}: numbers for {len(missing)} tensors that are not merged, such as "
            f"{missing[0]!r}",
            fix=did_you_mean(missing[0], known),
        )


def _weighed(item: Item, weights: Sequence[Any], recipe: Recipe, part: int | None) -> Item:
    """An item with its part and its weights as numbers."""
    if part is not None:
        weights = recipe.parts[part].weights or weights
        item = replace(item, part=str(part + 1))
    return replace(item, weights=tuple(float(value_at(each, item.site)) for each in weights))


def _placed(variant: Variant, sites: Sequence[Site], parts: Mapping[str, int]) -> Variant:
    recipe = variant.recipe
    if not parts and not any(True for _ in _scheduled(recipe)):
        return variant
    own = {name: recipe.parts[number] for name, number in parts.items()}
    chains = {
        site.name: (*build(recipe, site, own.get(site.name)), *variant.tail) for site in sites
    }
    return replace(variant, chains=chains)


def _check_thresholds(variant: Variant, items: Mapping[str, Item]) -> None:
    """What is measured over the whole model needs the same beginning of every chain of a part."""
    chains: dict[str, dict[Chain, None]] = {}
    for name, item in items.items() if variant.chains else ():
        chains.setdefault(item.part, {})[variant.at(name)] = None
    for distinct in chains.values():
        for ops in distinct:
            for end, op in enumerate(ops, start=1):
                if op.statistic is None or op.statistic.scope != "model":
                    continue
                if any(other[:end] != ops[:end] for other in distinct):
                    raise ParameterError(
                        f"{op.name} looks at the whole model at once, and its parameters differ "
                        "between tensors",
                        fix="give scope=tensor or scope=row (for sign election tie=plus), or the "
                        "same value everywhere",
                    )


def _check_weights(variant: Variant, items: Mapping[str, Item]) -> None:
    """Models that are too many, weights that cannot be normalised and a missing base show here."""
    seen: set[Any] = set()
    for name, item in items.items():
        ops = variant.at(name)
        if item.origin is None and needs_base(ops):
            raise MismatchError(
                f"{name}: {_method_at(variant, item)} looks at the base, and none has this tensor",
                fix="add --base with the model the inputs were fine-tuned from",
            )
        if (ops, item.weights) not in seen:
            seen.add((ops, item.weights))
            check_models(ops, item.weights)
            if is_linear(ops):
                coefficients(ops, item.site, item.weights)


def _method_at(variant: Variant, item: Item) -> str:
    recipe = variant.recipe
    method = recipe.parts[int(item.part) - 1].method if item.part else recipe.method
    return method or "a chain"
