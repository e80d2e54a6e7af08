"""What differs between tensors: weights, parameters and chains of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergebench.core.errors import MismatchError, ParameterError, did_you_mean
from mergebench.core.schedule import is_schedule, names, selectors, value_at
from mergebench.core.site import Site, make_sites, parse_pattern
from mergebench.merge.align import Aligned
from mergebench.merge.chains import check_models, coefficients, is_linear, needs_base
from mergebench.merge.item import Item
from mergebench.merge.mismatch import Evened
from mergebench.merge.op import Chain
from mergebench.merge.partition import check_matches, spelled
from mergebench.merge.selecting import UNSELECTED, Selected
from mergebench.merge.variants import Variant, build
from mergebench.recipe import Recipe


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
