"""mergekit's parameters as values of ours: scalars, gradients over layers, filters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

from mergebench.core.schedule import Cases, Gradient
from mergebench.core.selector import Selector
from mergebench.mergekit.document import Document, Path

#: Stands for a parameter that no level gives.
MISSING: Any = object()
#: Filters that every tensor matches.
_ALL = (None, "", "*")


def compiled(
    document: Document, levels: Sequence[tuple[Path, Any]], leaf: Callable[[Path, Any], Any]
) -> Any:
    """One value from what several levels say, the nearest first.

    A list of filters that no tensor of some kind matches leaves those tensors to the next level.

    Parameters
    ----------
    levels : sequence of (path, value)
        Of one parameter.
    leaf : callable ``(path, value)``
        Checks and converts a plain value.

    Returns
    -------
    plain value, Gradient, Cases or MISSING
        Cases without ``otherwise`` where some tensors are left without a value.
    """
    cases: list[tuple[Selector, Any]] = []
    for path, value in levels:
        if not (isinstance(value, list) and any(isinstance(each, dict) for each in value)):
            return _whole(cases, _plain(document, path, value, leaf))
        for place, each in enumerate(value):
            here = (*path, place)
            each = document.mapping(here, each, ("filter", "value"))  # noqa: PLW2901
            if "value" not in each:
                raise document.refuse(here, "has no `value`")
            found = _plain(document, (*here, "value"), each["value"], leaf)
            if each.get("filter") in _ALL:
                return _whole(cases, found)
            text = document.text((*here, "filter"), each["filter"])
            cases.append((Selector(_substring(text)), found))
    return Cases(tuple(cases)) if cases else MISSING


def _whole(cases: Sequence[tuple[Selector, Any]], rest: Any) -> Any:
    return Cases(tuple(cases), rest) if cases else rest


def _plain(document: Document, path: Path, value: Any, leaf: Callable[[Path, Any], Any]) -> Any:
    if not isinstance(value, list):
        return leaf(path, value)
    numbers = [number(document, path, each) for each in document.listed(path, value)]
    checked = [leaf(path, each) for each in numbers]
    if any(each != one for each, one in zip(checked, numbers, strict=True)):
        raise document.refuse(path, "cannot be a gradient over layers", got=value)
    return Gradient(tuple(checked)) if len(checked) > 1 else checked[0]


def number(document: Document, path: Path, value: Any) -> float:
    """A finite number, which YAML may have taken for text."""
    try:
        found = float("nan") if isinstance(value, (bool, list, dict)) else float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not isfinite(found):
        raise document.refuse(path, "must be a number", got=value)
    return found


def _substring(text: str) -> str:
    """A selector for the names that contain a text."""
    escaped = re.escape(text)
    # ``class=norm`` would be a class of tensors, and no part of a name.
    return f"(?:{escaped})" if "=" in text else escaped


def has_gap(value: Any) -> bool:
    """Whether some tensors are left without a value."""
    if not isinstance(value, Cases):
        return value is MISSING
    inner = [case for _, case in value.cases]
    return value.otherwise is None or any(map(has_gap, (*inner, value.otherwise)))


def filled(value: Any, default: Any) -> Any:
    """The value, with a default wherever it has none."""
    if value is MISSING:
        return default
    if isinstance(value, Cases):
        rest = default if value.otherwise is None else filled(value.otherwise, default)
        return Cases(tuple((s, filled(case, default)) for s, case in value.cases), rest)
    return value


def over_slices(values: Sequence[Any], lengths: Sequence[int]) -> Any:
    """One value for a stack of slices, from the value in each.

    A gradient runs over its slice; before the blocks the first slice's value at its first layer
    counts, behind them the last slice's.
    """
    first = values[0]
    if len(values) == 1 or (all(each == first for each in values) and not _slopes(first)):
        return first
    cases: list[tuple[Selector, Any]] = []
    start = 0
    for value, length in zip(values, lengths, strict=True):
        if _slopes(value):
            for place in range(length):
                depth = place / (length - 1) if length > 1 else 1.0
                cases.append((Selector(f"block={start + place}"), at(value, depth)))
        else:
            cases.append((Selector(f"block={start}-{start + length - 1}"), value))
        start += length
    rest, behind = at(first, 0.0), at(values[-1], 0.0)
    if rest != behind:
        cases.append((Selector("block=after"), behind))
    return Cases(tuple(cases), rest)


def _slopes(value: Any) -> bool:
    if isinstance(value, Cases):
        return any(map(_slopes, (*(case for _, case in value.cases), value.otherwise)))
    return isinstance(value, Gradient)


def at(value: Any, depth: float) -> Any:
    """The value with every gradient replaced by its number at a depth between 0 and 1."""
    if isinstance(value, Gradient):
        return value.along(depth)
    if isinstance(value, Cases):
        cases = tuple((selector, at(case, depth)) for selector, case in value.cases)
        return Cases(cases, at(value.otherwise, depth))
    return value
