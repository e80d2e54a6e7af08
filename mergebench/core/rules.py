"""Rules as written on the command line: ``class=norm:lam=0,weight=1/0``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergebench.core.errors import ParameterError
from mergebench.core.params import ALIASES, Param
from mergebench.core.schedule import ByName, Cases, each_leaf, leaves, parse_schedule
from mergebench.core.selector import Selector

_RULE = re.compile(r"(?P<select>.+):(?P<set>\w+=[^:,=]+(?:,\w+=[^:,=]+)*)", re.DOTALL)
#: What a rule calls the weights of the models.
WEIGHT = "weight"


def parse_rule(text: str) -> tuple[Selector, dict[str, str]]:
    """Selector and assignments of ``SELECTOR:name=value,name=value``.

    Raises
    ------
    ParameterError
        If it is not written so, or the selector is none.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise ParameterError(
            "a rule is written SELECTOR:name=value",
            got=repr(text),
            fix="such as class=norm:lam=0 or 'mlp\\.up:density=0.1,weight=1/0'",
        )
    assigned: dict[str, str] = {}
    for part in match["set"].split(","):
        key, _, value = part.partition("=")
        name = ALIASES.get(key.strip(), key.strip())
        if name in assigned:
            raise ParameterError(f"rule {text!r} gives {name!r} twice", fix="keep one of them")
        assigned[name] = value.strip()
    return Selector(match["select"]), assigned


def add_rules(
    texts: Sequence[str], params: Mapping[str, Any], weights: Sequence[Any]
) -> tuple[dict[str, Any], list[Any]]:
    """Parameters and weights with the rules added to them, the first rule first.

    Parameters
    ----------
    texts : sequence of str
        Each as for :func:`parse_rule`; ``weight=0.3`` is the weight of every model and
        ``weight=1/0`` one for each, in the order of the models.
    params : mapping
        Plain values, schedules, or tuples of them (one output per value).
    weights : sequence of float, Gradient or Cases

    Raises
    ------
    ParameterError
        For a malformed rule, or another number of weights than of models.
    """
    rules = [parse_rule(text) for text in texts]
    known = {ALIASES.get(key, key): value for key, value in params.items()} if rules else params
    changed: dict[str, Any] = dict(known)
    new = list(weights)
    for selector, assigned in rules:
        for name, text in assigned.items():
            if name != WEIGHT:
                before = changed.get(name)
                value = parse_schedule(text, name)
                changed[name] = (
                    tuple(_case(each, selector, value) for each in before)
                    if isinstance(before, tuple)
                    else _case(before, selector, value)
                )
                continue
            parts = [part.strip() for part in text.split("/")]
            if len(parts) not in (1, len(new)):
                raise ParameterError(
                    f"rule for {selector}: {len(parts)} weights",
                    expected=f"1 or {len(new)}, one for each model",
                )
            each_part = parts * len(new) if len(parts) == 1 else parts
            values = [parse_weight(part, str(selector)) for part in each_part]
            new = [_case(old, selector, v) for old, v in zip(new, values, strict=True)]
    return changed, new


def parse_weight(data: Any, where: str) -> Any:
    """A weight: a finite number, or a schedule of them.

    Raises
    ------
    ParameterError
        If it is neither.
    """
    param = Param(WEIGHT, float)
    value = parse_schedule(data, WEIGHT)
    if isinstance(value, ByName) and (texts := [v for v in leaves(value) if isinstance(v, str)]):
        raise ParameterError(f"{where}: `{WEIGHT}` by tensor must be numbers", got=repr(texts[0]))
    default = 1.0 if isinstance(value, (Cases, ByName)) else None
    return each_leaf(value, lambda leaf: param.check(leaf, where), default)


def _case(before: Any, selector: Selector, value: Any) -> Cases:
    before = parse_schedule(before, str(selector))
    # Values that rules have made so far keep their precedence.
    if isinstance(before, Cases):
        return Cases((*before.cases, (selector, value)), before.otherwise)
    return Cases(((selector, value),), before)
