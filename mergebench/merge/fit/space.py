"""What may be tried: values of a method's parameters, and of those of the ops after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from mergebench.core.errors import ParameterError, did_you_mean
from mergebench.core.params import ALIASES, Param
from mergebench.core.schedule import Gradient
from mergebench.merge.fit.ranges import Choices, Values, declared_range, parse
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS
from mergebench.recipe import MOST, Recipe
from mergebench.steps import OpRef


@dataclass(frozen=True)
class Dimension:
    """One parameter that may have several values.

    Attributes
    ----------
    name : str
        ``lam`` of the method, ``lines.beta`` of an op after it.
    place : int
        Of the op among ``then``; -1 for the method.
    key : str
    values : Choices or Range
    """

    name: str
    place: int
    key: str
    values: Values

    def put(self, recipe: Recipe, value: Any) -> Recipe:
        """The recipe with a value."""
        if self.place < 0:
            return replace(recipe, params={**recipe.params, self.key: value})
        then = list(recipe.then)
        ref = then[self.place]
        then[self.place] = OpRef(ref.name, {**ref.params, self.key: value})
        return replace(recipe, then=tuple(then))

    @property
    def listed(self) -> tuple[Any, ...]:
        """Every value, for a grid.

        Raises
        ------
        ParameterError
            For a range without a step.
        """
        if isinstance(self.values, Choices):
            return self.values.values
        numbers = self.values.grid
        if not numbers:
            raise ParameterError(
                f"{self.name}: a range without a step has no list of values",
                fix=f"give one, {self.name}={self.values.low:g}:{self.values.high:g}:0.1, or use "
                "`fit search`",
            )
        if not self.values.anchors:
            return numbers
        if len(numbers) ** self.values.anchors > MOST:
            raise ParameterError(
                f"{self.name}: {len(numbers)} values at {self.values.anchors} places are too many",
                fix="a larger step, or `fit search`",
            )
        return tuple(map(Gradient, product(numbers, repeat=self.values.anchors)))


def declared_params(recipe: Recipe, place: int) -> tuple[str, Mapping[str, Param]]:
    """Name and parameters of the method (-1) or of an op after it."""
    if place < 0:
        if not recipe.method:
            return "the recipe", {}
        return recipe.method, METHODS[recipe.method].params
    name = recipe.then[place].name
    return name, OPS[name].params


def fixed_and_free(recipe: Recipe) -> tuple[Recipe, list[Dimension]]:
    """What is fixed of a recipe, and what has several values.

    A parameter has several if it is a list, a text such as ``0.2/0.4`` (of numbers and choices),
    a range ``LOW:HIGH``, ``LOW:HIGH:STEP`` or ``LOW:HIGH:log``, with ``:xK`` for K places over
    depth, or :data:`~mergebench.merge.fit.ranges.DECLARED`.

    Raises
    ------
    ParameterError
        For an unknown parameter, and for values that it does not take.
    """
    dimensions: list[Dimension] = []
    plain = recipe
    names: set[str] = set()
    for place in range(-1, len(recipe.then)):
        owner, known = declared_params(recipe, place)
        given = recipe.params if place < 0 else recipe.then[place].params
        kept = {}
        for key, listed in given.items():
            alone = isinstance(listed, (list, tuple)) and len(listed) == 1
            value = listed[0] if alone else listed
            param = known.get(ALIASES.get(key, key))
            if param is None:
                # Left for the plan, whose message knows of presets and of recipes without method.
                kept[key] = value
                continue
            values = parse(value, param, owner)
            if values is None:
                kept[key] = value
                continue
            name = _named(param.name, place, recipe, names)
            names.add(name)
            dimensions.append(Dimension(name, place, param.name, values))
        plain = _with(plain, place, kept)
    return plain, dimensions


def _with(recipe: Recipe, place: int, params: dict[str, Any]) -> Recipe:
    if place < 0:
        return replace(recipe, params=params)
    then = list(recipe.then)
    then[place] = OpRef(then[place].name, params)
    return replace(recipe, then=tuple(then))


def _named(key: str, place: int, recipe: Recipe, taken: set[str]) -> str:
    if place < 0:
        return key
    name = f"{recipe.then[place].name}.{key}"
    return name if name not in taken else f"{recipe.then[place].name}.{place + 1}.{key}"


def numbers_of(recipe: Recipe) -> list[Dimension]:
    """Every number that method and ops declare and that is not given, with its declared range.

    Raises
    ------
    ParameterError
        If there is none.
    """
    found: list[Dimension] = []
    for place in range(-1, len(recipe.then)):
        _, known = declared_params(recipe, place)
        given = recipe.params if place < 0 else recipe.then[place].params
        said = {ALIASES.get(key, key) for key in given}
        for param in known.values():
            values = declared_range(param) if param.kind is float else None
            if values is not None and param.name not in said and not param.choices:
                name = _named(param.name, place, recipe, {each.name for each in found})
                found.append(Dimension(name, place, param.name, values))
    if not found:
        raise ParameterError(
            f"{recipe.method or 'the recipe'}: declares no number that could be searched",
            fix="name parameters, -p NAME=LOW:HIGH or -p NAME=a,b, or another method",
        )
    return found


def variants_of(recipe: Recipe, dimensions: Sequence[Dimension]) -> Iterator[tuple[str, Recipe]]:
    """``(label, recipe)`` of every combination of listed values.

    Raises
    ------
    ParameterError
        For a range without a step, and for more combinations than :data:`~mergebench.recipe.MOST`.
    """
    lists = [each.listed for each in dimensions]
    if (count := prod(map(len, lists))) > MOST:
        raise ParameterError(
            f"{recipe.method or 'the recipe'}: too many combinations of listed values",
            expected=f"at most {MOST}",
            got=str(count),
            fix="list fewer, or use `fit search`",
        )
    for values in product(*lists):
        yield labelled(dimensions, values), placed(recipe, dimensions, values)


def placed(recipe: Recipe, dimensions: Sequence[Dimension], values: Sequence[Any]) -> Recipe:
    """The recipe with a value for each dimension."""
    for each, value in zip(dimensions, values, strict=True):
        recipe = each.put(recipe, value)
    return recipe


def labelled(dimensions: Sequence[Dimension], values: Sequence[Any]) -> str:
    """Such as ``density=0.2,lines.beta=0.4``."""
    pairs = zip(dimensions, values, strict=True)
    return ",".join(f"{each.name}={_written(value)}" for each, value in pairs)


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def with_values(recipe: Recipe, texts: Mapping[str, str]) -> Recipe:
    """The recipe with values for those of these parameters that its method has and does not give.

    Names as of :class:`Dimension`: ``lam`` of the method, ``lines.beta`` of an op after it.
    """
    for name, text in texts.items():
        op, dot, key = name.rpartition(".")
        places = [i for i, ref in enumerate(recipe.then) if ref.name == op] if dot else [-1]
        for place in places:
            _, known = declared_params(recipe, place)
            given = recipe.params if place < 0 else recipe.then[place].params
            key = ALIASES.get(key, key)
            if key in known and key not in {ALIASES.get(each, each) for each in given}:
                recipe = _with(recipe, place, {**given, key: text})
    return recipe


def check_known(names: Sequence[str], recipes: Sequence[Recipe]) -> None:
    """Refuse names that no recipe's method or ops have.

    Raises
    ------
    ParameterError
        With the nearest known one.
    """
    known: set[str] = set()
    for recipe in recipes:
        for place in range(-1, len(recipe.then)):
            owner, params = declared_params(recipe, place)
            known |= {key if place < 0 else f"{owner}.{key}" for key in params}
    for name in names:
        if ALIASES.get(name, name) not in known:
            raise ParameterError(
                f"no line has a parameter {name!r}", fix=did_you_mean(name, sorted(known))
            )
