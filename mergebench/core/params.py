"""Declared parameters: one annotated signature gives validation, parsing, help and tests.

The grammar of messages is: *ties: `density` must be a number in (0, 1], got 1.4*.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from operator import index
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Interval

from mergebench.core.errors import ParameterError, did_you_mean
from mergebench.core.schedule import ByName, Cases, each_leaf, parse_schedule

#: The seed of everything that is random.
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
#: Spellings that users may write instead of a parameter's name in the signature.
ALIASES: Mapping[str, str] = {"lambda": "lam"}


@dataclass(frozen=True)
class Examples:
    """Values that a text parameter may take, for its help and for random tests."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Param:
    """One parameter of a method or op.

    Attributes
    ----------
    name : str
    kind : type
        ``float``, ``int``, ``bool`` or ``str``.
    default : object
        ``inspect.Parameter.empty`` where the parameter is required.
    choices : tuple
        The allowed values, where the annotation is a ``Literal``.
    examples : tuple of str
        Values that a text may take.
    low, high : float or None
        Bounds; ``open_low`` and ``open_high`` say whether they are excluded.
    """

    name: str
    kind: type
    default: Any = inspect.Parameter.empty
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    examples: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether the user must give a value."""
        return self.default is inspect.Parameter.empty

    def describe(self) -> str:
        """What is allowed, in words: ``a number in (0, 1]``."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return f"text such as {', '.join(self.examples)}" if self.examples else "text"
        noun = "an integer" if self.kind is int else "a number"
        if self.low is None and self.high is None:
            return noun
        form = "d" if self.kind is int else "g"
        if self.high is None:
            return f"{noun} {'>' if self.open_low else '>='} {self.low:{form}}"
        if self.low is None:
            return f"{noun} {'<' if self.open_high else '<='} {self.high:{form}}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{noun} in {left}{self.low:{form}}, {self.high:{form}}{right}"

    def check(self, value: Any, owner: str) -> Any:
        """The value, converted to ``kind``.

        Raises
        ------
        ParameterError
            If it is of another type or out of bounds.
        """
        converted = self._convert(value)
        if converted is None or not self._allows(converted):
            raise ParameterError(
                f"{owner}: `{self.name}` must be {self.describe()}", got=f"{value}"
            )
        return converted

    def _convert(self, value: Any) -> Any:
        if self.choices:
            return value if value in self.choices else None
        if self.kind is bool:
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            return value if isinstance(value, bool) else words.get(str(value).lower())
        if self.kind is str:
            # Numbers, and a list of them, as YAML reads them.
            written = isinstance(value, (str, int, float, list)) and not isinstance(value, bool)
            return str(value) if written else None
        if isinstance(value, bool):
            return None
        if self.kind is int:
            # Not by way of a float, which holds integers up to 2^53 only.
            with suppress(TypeError, ValueError):
                return int(value) if isinstance(value, str) else index(value)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        if self.kind is int:
            return int(number) if isfinite(number) and number == int(number) else None
        return number

    def _allows(self, value: Any) -> bool:
        if self.choices or self.kind in (bool, str):
            return True
        if not isinstance(value, int) and not isfinite(value):
            return False
        if self.low is not None and (value <= self.low if self.open_low else value < self.low):
            return False
        return not (
            self.high is not None and (value >= self.high if self.open_high else value > self.high)
        )


def _checked(param: Param, value: Any, owner: str, default: Any) -> Any:
    """The value with every plain value in it checked."""
    if (
        {"cases", "by_name"} & set(value)
        if isinstance(value, Mapping)
        else param.kind in (float, int)
    ):
        value = parse_schedule(value, param.name)
    if isinstance(value, (Cases, ByName)) and value.otherwise is None and default is None:
        raise ParameterError(
            f"{owner}: `{param.name}` has values for some tensors only, and no default",
            fix=f"give {param.name}=…, {param.describe()}",
        )
    return each_leaf(value, lambda leaf: param.check(leaf, owner), default)


def declared(function: Callable[..., Any], skip: int = 0) -> dict[str, Param]:
    """The parameters of an annotated function, without its first ``skip`` ones."""
    hints = get_type_hints(function, include_extras=True)
    found = {}
    for parameter in list(inspect.signature(function).parameters.values())[skip:]:
        found[parameter.name] = _param(parameter.name, hints[parameter.name], parameter.default)
    return found


def _param(name: str, hint: Any, default: Any) -> Param:
    low = high = None
    open_low = open_high = False
    constraints: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *extra = get_args(hint)
        constraints = tuple(extra)
    examples: tuple[str, ...] = ()
    for constraint in constraints:
        if isinstance(constraint, Examples):
            examples = constraint.values
        for attribute in ("ge", "gt"):
            if (bound := getattr(constraint, attribute, None)) is not None:
                low, open_low = bound, attribute == "gt"
        for attribute in ("le", "lt"):
            if (bound := getattr(constraint, attribute, None)) is not None:
                high, open_high = bound, attribute == "lt"
    if get_origin(hint) is Literal:
        return Param(name, str, default, choices=get_args(hint))
    if hint not in (float, int, bool, str):
        raise TypeError(f"parameter {name}: {hint} cannot be declared")
    return Param(name, hint, default, (), low, high, open_low, open_high, examples)


def bind(
    owner: str,
    params: Mapping[str, Param],
    given: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All parameters of ``owner``: checked user values over preset ones over declared ones.

    A value may be a schedule (see :mod:`mergebench.core.schedule`), whose plain values are checked.

    Raises
    ------
    ParameterError
        For an unknown name (with the nearest known one), a missing or a forbidden value.
    """
    values = {name: param.default for name, param in params.items() if not param.required}
    values |= dict(defaults or {})
    seen: set[str] = set()
    for key, value in given.items():
        name = key if key in params else ALIASES.get(key, key)
        if name not in params:
            raise ParameterError(
                f"{owner}: no parameter `{key}`",
                fix=did_you_mean(key, params) if params else f"{owner} takes none",
            )
        if name in seen:
            raise ParameterError(
                f"{owner}: `{name}` is given twice", fix="keep one of its spellings"
            )
        seen.add(name)
        values[name] = _checked(params[name], value, owner, values.get(name))
    if missing := [name for name in params if name not in values]:
        raise ParameterError(
            f"{owner}: `{missing[0]}` is required, {params[missing[0]].describe()}",
            fix=f"give {missing[0]}=…",
        )
    return {name: values[name] for name in params}
