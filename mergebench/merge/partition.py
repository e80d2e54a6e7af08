"""Parts of a model that are merged by methods of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from mergebench.core.errors import ParameterError
from mergebench.core.params import bind
from mergebench.core.rules import parse_weight
from mergebench.core.selector import Selector
from mergebench.core.site import Site
from mergebench.merge.method import METHODS, Method
from mergebench.merge.op import OPS
from mergebench.recipe import Recipe
from mergebench.steps import OpRef, Part


def expanded_op(ref: OpRef) -> OpRef:
    """An op with every parameter at its value.

    Raises
    ------
    ParameterError
        For unknown names, and values out of bounds.
    """
    return OpRef(ref.name, bind(ref.name, OPS[ref.name].params, ref.params))


def expanded_part(number: int, recipe: Recipe) -> Part:
    """Part ``number`` (from 0) with every parameter at its value.

    Raises
    ------
    ParameterError
        For unknown names, values out of bounds, and a number of models or weights that does not
        fit; naming the part.
    """
    part = recipe.parts[number]
    try:
        return _expanded(part, len(recipe.models))
    except ParameterError as error:
        raise ParameterError(
            f"{spelled(recipe, number)}: {error.what}",
            got=error.got,
            expected=error.expected,
            fix=error.fix,
        ) from None


def spelled(recipe: Recipe, number: int) -> str:
    """What a part is called in messages."""
    return f"part {number + 1} ({recipe.parts[number].select})"


def _expanded(part: Part, count: int) -> Part:
    method = METHODS[part.method] if part.method else None
    if (method is None) == (not part.ops):
        raise ParameterError("needs one of a method and ops", fix="give exactly one")
    if part.weights and len(part.weights) != count:
        raise ParameterError(
            "number of weights", got=str(len(part.weights)), expected=f"{count}, one for each model"
        )
    if method is None and (part.params or part.compat):
        raise ParameterError("parameters and presets belong to a method", fix="write a method")
    check_count(method, count)
    return replace(
        part,
        params={} if method is None else method.expand(part.params, part.compat),
        ops=tuple(map(expanded_op, part.ops)),
        then=tuple(map(expanded_op, part.then)),
        weights=tuple(parse_weight(each, "weights") for each in part.weights),
    )


def check_count(method: Method | None, count: int) -> None:
    """Refuse a number of models that a method does not take; a chain takes any.

    Raises
    ------
    ParameterError
    """
    if method is None:
        return
    least, most = method.models
    if count < least or (most is not None and count > most):
        limit = f"{least} or more" if most is None else f"{least} to {most}"
        raise ParameterError(f"{method.name}: number of models", got=str(count), expected=limit)


def methods_of(recipe: Recipe) -> list[Method | None]:
    """The methods in use, the parts' behind the recipe's own; ``None`` for chains written out."""
    own: list[Method | None] = []
    if recipe.method or recipe.ops:
        own.append(METHODS[recipe.method] if recipe.method else None)
    return own + [METHODS[part.method] if part.method else None for part in recipe.parts]


def assign(
    recipe: Recipe, sites: Mapping[str, Site], tied: Sequence[Collection[str]]
) -> dict[str, int]:
    """The part of each tensor that has one: the first that selects it.

    Parameters
    ----------
    recipe : Recipe
    sites : mapping of tensor name to Site
        Of all inputs.
    tied : sequence of names
        That are one tensor, whichever of them is meant.

    Raises
    ------
    ParameterError
        If a selector matches no tensor, or earlier parts have all that a part selects.
    """
    found: dict[str, int] = {}
    for number, part in enumerate(recipe.parts):
        name = spelled(recipe, number)
        mine = selected(sites, tied, part.include, part.exclude, name, name) - found.keys()
        if not mine:
            raise ParameterError(
                f"{name}: has no tensor, as parts before it have all that it selects",
                fix="put it before them, or leave it out",
            )
        found |= dict.fromkeys(mine, number)
    return found


def selected(
    sites: Mapping[str, Site],
    tied: Sequence[Collection[str]],
    include: Sequence[str],
    exclude: Sequence[str],
    including: str = "include",
    excluding: str = "exclude",
) -> set[str]:
    """Names that any of ``include`` selects, all if there is none, and none of ``exclude``.

    Parameters
    ----------
    including, excluding : str
        What to call the selectors in messages.

    Raises
    ------
    ParameterError
        If a selector is none or matches no tensor.
    """

    def meant(option: str, texts: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for selector in map(Selector, texts):
            check_matches(f"{option}: {selector}", selector, sites.values())
            found |= {name for name, site in sites.items() if selector.matches(site)}
        for names in tied:
            if not found.isdisjoint(names):
                found.update(names)
        return found

    wanted = meant(including, include) if include else set(sites)
    return wanted - meant(excluding, exclude)


def check_matches(what: str, selector: Selector, sites: Iterable[Site]) -> None:
    """Refuse a selector that matches nothing.

    Raises
    ------
    ParameterError
    """
    if not any(selector.matches(site) for site in sites):
        raise ParameterError(
            f"{what} matches no tensor",
            fix="`mergebench inspect --tensors` lists the names; a regular expression, class=norm "
            "or block=0-3 selects",
        )
