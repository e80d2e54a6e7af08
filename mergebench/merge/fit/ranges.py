"""Values of one parameter: those listed, a range, or all that it declares."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from math import floor, isfinite
from typing import Any

from mergebench.core.errors import ParameterError
from mergebench.core.params import Param

#: Stands for a parameter that is named without a value: all that its method declares.
DECLARED = object()
#: How far from an end that is excluded, as a share of the range.
_INSIDE = 0.01
_DIGITS = 6
_RANGE = re.compile(r"[^:]*:[^:]*(?::[^:]*)*")
_ANCHORS = re.compile(r"x(\d+)")


@dataclass(frozen=True)
class Choices:
    """Values to choose from, in order."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """Numbers between two others, both included.

    Attributes
    ----------
    low, high : float
    step : float or None
        From ``low`` on.
    log : bool
        Even in the logarithm.
    whole : bool
        Integers.
    anchors : int
        0 for one number; K for a :class:`~mergebench.core.schedule.Gradient` of K over depth.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False
    anchors: int = 0

    @property
    def grid(self) -> tuple[Any, ...]:
        """Every number of a range with a step."""
        if self.step is None:
            return ()
        count = floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.number(self.low + place * self.step) for place in range(count))

    def number(self, value: float) -> Any:
        """A number as a recipe has it: short, and an integer where one is wanted."""
        return round(value) if self.whole else float(f"{value:.{_DIGITS}g}")


Values = Choices | Range


def parse(value: Any, param: Param, owner: str) -> Values | None:
    """The values of a parameter, ``None`` if it is a single one.

    Raises
    ------
    ParameterError
    """
    if value is DECLARED:
        found = declared_range(param)
        if found is None:
            raise ParameterError(
                f"{owner}: `{param.name}` declares no range, it is {param.describe()}",
                fix=f"give one, {param.name}=LOW:HIGH or {param.name}=a,b",
            )
        return found
    if isinstance(value, (list, tuple)):
        return Choices(tuple(_single(each, param, owner) for each in value))
    if not isinstance(value, str):
        return None
    # Texts are file names and the like, in which both signs may stand.
    if (param.kind is not str or param.choices) and "/" in value:
        return Choices(tuple(_single(each, param, owner) for each in value.split("/")))
    if param.kind in (int, float) and _RANGE.fullmatch(value):
        return _range(value, param, owner)
    return None


def _single(value: Any, param: Param, owner: str) -> Any:
    """A listed value; schedules are left as they are."""
    if isinstance(value, str) and ".." in value:
        return value
    return param.check(value, owner) if isinstance(value, (str, int, float)) else value


def _range(text: str, param: Param, owner: str) -> Range:
    low, high, *more = text.split(":")
    wrong = ParameterError(
        f"{owner}: `{param.name}` has no range {text!r}",
        expected=f"{param.name}=LOW:HIGH, LOW:HIGH:STEP or LOW:HIGH:log, and :xK for K places "
        "over depth",
    )
    ends = [param.check(each, owner) for each in (low, high)]
    step, log, anchors = None, False, 0
    for each in more:
        if each == "log" and not log:
            log = True
        elif (match := _ANCHORS.fullmatch(each)) and not anchors:
            anchors = int(match[1])
        elif step is None:
            try:
                step = float(each)
            except ValueError:
                raise wrong from None
        else:
            raise wrong
    fits = step is None or (isfinite(step) and 0 < step <= ends[1] - ends[0] and not log)
    if ends[0] >= ends[1] or not fits or (log and ends[0] <= 0) or anchors == 1 or anchors > 16:
        raise wrong
    whole = param.kind is int
    if whole and (anchors or (step is not None and step != int(step))):
        raise wrong
    if whole and step is None and not log:
        step = 1.0
    return Range(ends[0], ends[1], step=step, log=log, whole=whole, anchors=anchors)


def declared_range(param: Param) -> Values | None:
    """All that a parameter declares, where that has two ends.

    An excluded end is moved inwards by a hundredth. A number without an upper end goes to twice
    its default, or 1 if that is more; one without a lower end starts at 0.
    """
    if param.choices:
        return Choices(param.choices)
    if param.kind is bool:
        return Choices((False, True))
    if param.kind is str:
        return None
    low, high = _ends(param)
    if param.kind is int:
        bounded = param.low is not None and param.high is not None
        return Range(low, high, step=1.0, whole=True) if bounded else None
    return Range(low, high) if low < high else None


def _ends(param: Param) -> tuple[float, float]:
    default = 1.0 if param.default is inspect.Parameter.empty else float(param.default)
    low = min(0.0, 2 * default) if param.low is None else float(param.low)
    high = max(1.0, 2 * default) if param.high is None else float(param.high)
    inside = (high - low) * _INSIDE
    if param.kind is int:
        return low + param.open_low, high - param.open_high
    return low + inside * param.open_low, high - inside * param.open_high
