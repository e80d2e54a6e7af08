"""Schedules: values that differ between the tensors of a model.

A parameter or a weight is a plain value, a :class:`Gradient` over the depth of the model,
:class:`Cases` for selected tensors, or a :class:`ByName`. All are frozen values, so they can be
hashed, stored in a recipe and printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

from mergebench.core.errors import ParameterError
from mergebench.core.selector import Selector
from mergebench.core.site import Site


@dataclass(frozen=True)
class Gradient:
    """Numbers spread evenly over the depth of a stack of blocks, with straight lines in between.

    Written ``0..0.5..1``. The first block of a stack takes the first number and the last block the
    last. Tensors outside of numbered blocks take the first, as in mergekit; :class:`Cases` says
    otherwise. A stack of a single block has depth 1 and takes the last.

    Attributes
    ----------
    values : tuple of float, at least 2
    """

    values: tuple[float, ...]

    def at(self, site: Site) -> float:
        """The number at one tensor."""
        return self.along(site.depth or 0.0)

    def along(self, depth: float) -> float:
        """The number at a depth between 0 and 1."""
        place = depth * (len(self.values) - 1)
        index = min(int(place), len(self.values) - 2)
        share = place - index
        left, right = self.values[index], self.values[index + 1]
        # Exact at both ends.
        return right if share == 1 else left + (right - left) * share

    def __str__(self) -> str:
        return "..".join(map(_short, self.values))


@dataclass(frozen=True)
class Cases:
    """Values for selected tensors; the first selector that matches wins.

    Attributes
    ----------
    cases : tuple of (Selector, plain value, Gradient or Cases)
    otherwise : plain value, Gradient, Cases or None
        For all other tensors; ``None`` stands for the parameter's default.
    """

    cases: tuple[tuple[Selector, Any], ...]
    otherwise: Any = None

    def at(self, site: Site) -> Any:
        """The value at one tensor."""
        for selector, value in self.cases:
            if selector.matches(site):
                return value_at(value, site)
        return value_at(self.otherwise, site)

    def __str__(self) -> str:
        return "; ".join(
            [f"{value} at {selector}" for selector, value in self.cases] + [str(self.otherwise)]
        )


@dataclass(frozen=True)
class ByName:
    """A value for each tensor that is named: what is learned tensor by tensor.

    Attributes
    ----------
    pairs : tuple of (str, float or str)
        Names of tensors in the base's layout, each once.
    otherwise : float, str or None
        For all other tensors; ``None`` stands for the parameter's default.
    """

    pairs: tuple[tuple[str, Any], ...]
    otherwise: Any = None

    @cached_property
    def _values(self) -> dict[str, Any]:
        return dict(self.pairs)

    def at(self, site: Site) -> Any:
        """The value at one tensor."""
        return self._values.get(site.name, self.otherwise)

    def __str__(self) -> str:
        return f"{len(self.pairs)} values by tensor"


def _short(number: float) -> str:
    return str(int(number)) if number == int(number) else repr(number)


def is_schedule(value: Any) -> bool:
    """Whether a value differs between tensors."""
    return isinstance(value, (Gradient, Cases, ByName))


def value_at(value: Any, site: Site) -> Any:
    """A value at one tensor; plain values are the same everywhere."""
    return value.at(site) if is_schedule(value) else value


def leaves(value: Any) -> Iterator[Any]:
    """The plain values that a value consists of."""
    if isinstance(value, Gradient):
        yield from value.values
    elif isinstance(value, Cases):
        for _, case in value.cases:
            yield from leaves(case)
        yield from leaves(value.otherwise)
    elif isinstance(value, ByName):
        yield from (number for _, number in value.pairs)
        yield value.otherwise
    else:
        yield value


def each_leaf(value: Any, function: Callable[[Any], Any], default: Any = None) -> Any:
    """The value with ``function`` applied to its plain values; ``default`` fills what is unset."""
    if isinstance(value, Gradient):
        return Gradient(tuple(function(each) for each in value.values))
    if isinstance(value, Cases):
        cases = tuple(
            (selector, each_leaf(case, function, default)) for selector, case in value.cases
        )
        rest = default if value.otherwise is None else each_leaf(value.otherwise, function, default)
        return Cases(cases, rest)
    if isinstance(value, ByName):
        rest = default if value.otherwise is None else function(value.otherwise)
        return ByName(tuple((name, function(number)) for name, number in value.pairs), rest)
    return function(value)


def selectors(value: Any) -> tuple[Selector, ...]:
    """The selectors of a value; none for a plain value or a gradient."""
    if not isinstance(value, Cases):
        return ()
    inner = [each for _, case in value.cases for each in selectors(case)]
    return (*(each for each, _ in value.cases), *inner, *selectors(value.otherwise))


def names(value: Any) -> tuple[str, ...]:
    """The tensors that a value names."""
    if isinstance(value, Cases):
        inner = [each for _, case in value.cases for each in names(case)]
        return (*inner, *names(value.otherwise))
    return tuple(name for name, _ in value.pairs) if isinstance(value, ByName) else ()


def parse_schedule(data: Any, name: str) -> Any:
    """A value from recipe data or text: plain values are returned as they are.

    Parameters
    ----------
    data : object
        ``"0..0.5..1"``, ``{"cases": [{"select": …, "value": …}], "else": …}`` or
        ``{"by_name": {name: number or text}, "else": …}``.
    name : str
        Of the parameter, for messages.

    Raises
    ------
    ParameterError
        For a malformed gradient, mapping or selector.
    """
    if is_schedule(data):
        return data
    if isinstance(data, str) and ".." in data:
        parts = data.split("..")
        values = tuple(_finite(part) for part in parts)
        if None in values:
            raise ParameterError(
                f"`{name}`: {data!r} is no gradient", expected="numbers such as 0..0.5..1"
            )
        return Gradient(tuple(value for value in values if value is not None))
    if isinstance(data, Mapping):
        return _by_name(data, name) if "by_name" in data else _cases(data, name)
    return data


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def _cases(data: Mapping[Any, Any], name: str) -> Cases:
    listed = data.get("cases")
    if set(data) - {"cases", "else"} or not isinstance(listed, list) or not listed:
        raise ParameterError(
            f"`{name}`: a mapping must be {{cases: [{{select, value}}, …], else: value}}",
            got=repr(dict(data))[:200],
        )
    cases = []
    for each in listed:
        if not isinstance(each, Mapping) or set(each) != {"select", "value"}:
            raise ParameterError(
                f"`{name}`: a case is {{select: …, value: …}}", got=repr(each)[:200]
            )
        if not isinstance(each["select"], str):
            raise ParameterError(
                f"`{name}`: `select` must be a text", got=repr(each["select"])[:200]
            )
        cases.append((Selector(each["select"]), _inner(each["value"], name)))
    return Cases(tuple(cases), _inner(data.get("else"), name))


def _by_name(data: Mapping[Any, Any], name: str) -> ByName:
    listed, rest = data["by_name"], data.get("else")
    if set(data) - {"by_name", "else"} or not isinstance(listed, Mapping) or not listed:
        raise ParameterError(
            f"`{name}`: values by tensor are {{by_name: {{tensor: value, …}}, else: value}}",
            got=repr(dict(data))[:200],
        )
    for tensor, number in [*listed.items(), ("else", 0.0 if rest is None else rest)]:
        if isinstance(number, bool) or not isinstance(number, (int, float, str)):
            raise ParameterError(
                f"`{name}`: the value at tensor {str(tensor)!r} is no number and no text",
                got=repr(number)[:99],
            )
    return ByName(tuple((str(tensor), number) for tensor, number in listed.items()), rest)


def _inner(data: Any, name: str) -> Any:
    if isinstance(data, list):
        raise ParameterError(
            f"`{name}`: the value of a case is a number, a gradient or cases", got=repr(data)[:200]
        )
    return parse_schedule(data, name)


def to_plain(value: Any) -> Any:
    """Recipe data from which :func:`parse_schedule` makes an equal value."""
    if isinstance(value, Gradient):
        return str(value)
    if isinstance(value, Cases):
        data: dict[str, Any] = {
            "cases": [
                {"select": selector.text, "value": to_plain(case)} for selector, case in value.cases
            ]
        }
        return data if value.otherwise is None else data | {"else": to_plain(value.otherwise)}
    if isinstance(value, ByName):
        table: dict[str, Any] = {"by_name": dict(value.pairs)}
        return table if value.otherwise is None else table | {"else": value.otherwise}
    return value
