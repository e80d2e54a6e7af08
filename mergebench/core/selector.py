"""Selectors: which tensors of a model a filter or a rule means."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from mergebench.core.errors import ParameterError, did_you_mean
from mergebench.core.regular import finder
from mergebench.core.site import CLASSES, Site, stands_before

_KEYED = re.compile(r"(?P<key>[a-z]+)=(?P<value>.*)", re.DOTALL)
_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")


@dataclass(frozen=True)
class Selector:
    """A set of tensors, written as text.

    ``class=norm`` selects a class of tensors (see :attr:`Site.kind`), ``block=3`` and
    ``block=3-7`` numbered blocks (both ends included), ``block=before`` and ``block=after`` what
    stands before the blocks (embeddings) and behind them (final norm, head), and everything else is
    a regular expression that is searched for in the tensor's name, in time that no pattern makes
    endless.

    Attributes
    ----------
    text : str

    Raises
    ------
    ParameterError
        For an unknown class, a block that is no number, an invalid regular expression, or one that
        could take too long.
    """

    text: str
    _test: partial[bool] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_test", _parse(self.text))

    def matches(self, site: Site) -> bool:
        """Whether the tensor is meant."""
        return self._test(site)

    def __str__(self) -> str:
        return self.text


def _parse(text: str) -> partial[bool]:
    keyed = _KEYED.fullmatch(text)
    if keyed and keyed["key"] == "class":
        if keyed["value"] not in CLASSES:
            raise ParameterError(
                f"selector {text!r}: no class {keyed['value']!r}",
                fix=did_you_mean(keyed["value"], CLASSES),
            )
        return partial(_of_class, keyed["value"])
    if keyed and keyed["key"] in ("block", "blocks"):
        if keyed["value"] in ("before", "after"):
            return partial(_outside, keyed["value"] == "before")
        between = _RANGE.fullmatch(keyed["value"])
        if between is None:
            raise ParameterError(
                f"selector {text!r}", expected="block=3, block=3-7, block=before or block=after"
            )
        first = int(between[1])
        return partial(_in_blocks, first, int(between[2] or first))
    if not text:
        raise ParameterError("a selector is empty", fix="give a regular expression or class=norm")
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ParameterError(
            f"selector {text!r} is not a regular expression", got=str(error)
        ) from None
    try:
        return partial(_named, finder(text))
    except re.error as error:
        raise ParameterError(
            f"selector {text!r} could take forever to match a name",
            got=str(error),
            fix="write it with fewer repeats, none inside another, or without looking around",
        ) from None


def _of_class(kind: str, site: Site) -> bool:
    return site.kind == kind


def _in_blocks(first: int, last: int, site: Site) -> bool:
    return site.block is not None and first <= site.block <= last


def _outside(before: bool, site: Site) -> bool:
    return site.block is None and stands_before(site.name) == before


def _named(found: Callable[[str], bool], site: Site) -> bool:
    return found(site.name)
