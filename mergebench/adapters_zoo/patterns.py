"""Regular expressions that stand in files, matched in time proportional to the text.

Python's ``re`` tries one way after the other, which for ``(a+)+b`` and the like takes 2ⁿ steps.
Patterns that could take long are matched by following all ways at once instead (K. Thompson,
Regular expression search algorithm, CACM 11(6), 1968).
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

# The parser of ``re``, which has no public name.
_SRE: Any = importlib.import_module("re._parser")
#: Most states of one pattern, counted repeats written out; most patterns of one config that are
#: more than a name.
STATES, PATTERNS = 500, 256
_KNOWN = 1000
_PLAIN = re.compile(r"[\w.-]+")
_CATEGORIES = {
    f"CATEGORY_{name}{word}": re.compile(sign)
    for word, (yes, no) in {
        "DIGIT": (r"\d", r"\D"), "SPACE": (r"\s", r"\S"), "WORD": (r"\w", r"\W")
    }.items()
    for name, sign in (("", yes), ("NOT_", no))
}  # fmt: skip
_Test = Callable[[str], bool]


def is_plain(pattern: str) -> bool:
    """Whether a pattern is a name, in which a dot stands for any letter."""
    return _PLAIN.fullmatch(pattern) is not None


def ends_with(pattern: str, text: str) -> bool:
    r"""Whether whole parts at the end of a dotted path match: ``(.*\.)?(pattern)$``.

    Raises
    ------
    re.error
        If the pattern is no regular expression, looks around or back, or is too large.
    """
    if not is_plain(pattern):
        return _compiled(pattern)(text)
    # Configs may hold a name for every module, too many to compile.
    start = len(text) - len(pattern)
    if start < 0 or (start and text[start - 1] != "."):
        return False
    pairs = zip(pattern, text[start:], strict=True)
    return all(one == other or (one == "." and other != "\n") for one, other in pairs)


@lru_cache(maxsize=PATTERNS)
def _compiled(pattern: str) -> Callable[[str], bool]:
    whole = rf"(.*\.)?({pattern})$"
    try:
        # What future versions of Python will read differently is no news to the user of a file.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = re.compile(whole)
            tree, own = _SRE.parse(whole), _SRE.parse(pattern)
    except (RecursionError, OverflowError) as error:
        raise re.error(str(error)) from None
    # One choice of the pattern's own, and that of where it begins, is at most the length squared.
    if _choices(own) <= 1:
        return lambda text: compiled.match(text) is not None
    return _Machine(tree).match


def _choices(tree: Iterable[Any]) -> int:
    """How often a pattern must choose how far to go; many where it repeats a choice."""
    count = 0
    for code, value in tree:
        name = str(code)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, part = value
            inner = _choices(part)
            count += (low != high) + inner * (2 if high != 1 else 1)
        elif name == "SUBPATTERN":
            count += _choices(value[-1])
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            count += 2
    return count


class _Machine:
    """States in a list: ``(test, next)`` reads a letter, ``(None, nexts)`` goes on at once.

    ``starts`` are those that go on at the beginning only.
    """

    def __init__(self, tree: Sequence[Any]) -> None:
        self.states: list[tuple[_Test | None, tuple[int, ...]]] = []
        self.starts: set[int] = set()
        self.end = self._add(None)
        self.first = self._closed({self._sequence(tree, self.end)}, first=True)
        self.known: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def match(self, text: str) -> bool:
        now = self.first
        for letter in text:
            if (then := self.known.get((now, letter))) is None:
                reached: set[int] = set()
                for state in now:
                    test, nexts = self.states[state]
                    if test is not None and test(letter):
                        reached.update(nexts)
                if len(self.known) >= _KNOWN:
                    self.known.clear()
                then = self.known[now, letter] = self._closed(reached)
            if not (now := then):
                return False
        return self.end in now

    def _closed(self, states: set[int], *, first: bool = False) -> frozenset[int]:
        left, found = list(states), set(states)
        while left:
            state = left.pop()
            test, nexts = self.states[state]
            if test is None and (first or state not in self.starts):
                new = [each for each in nexts if each not in found]
                found.update(new)
                left.extend(new)
        return frozenset(found)

    def _add(self, test: _Test | None, *nexts: int) -> int:
        if len(self.states) >= STATES:
            raise re.error("it is too large")
        self.states.append((test, nexts))
        return len(self.states) - 1

    def _sequence(self, tree: Sequence[Any], then: int) -> int:
        for code, value in reversed(list(tree)):
            then = self._one(str(code), value, then)
        return then

    def _one(self, code: str, value: Any, then: int) -> int:
        if code in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, part = value
            return self._repeat(low, high, part, then)
        if code == "SUBPATTERN" and not value[1] and not value[2]:
            return self._sequence(value[3], then)
        if code == "BRANCH":
            return self._add(None, *(self._sequence(each, then) for each in value[1]))
        # The whole text is read, so an end is one only where nothing comes after it.
        if code == "AT" and str(value) in ("AT_END", "AT_END_STRING") and then == self.end:
            return then
        if code == "AT" and str(value) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            start = self._add(None, then)
            self.starts.add(start)
            return start
        return self._add(_test(code, value), then)

    def _repeat(self, low: int, high: Any, part: Sequence[Any], then: int) -> int:
        if str(high) == "MAXREPEAT":
            loop = self._add(None)
            self.states[loop] = None, (self._sequence(part, loop), then)
            then = loop
        else:
            for _ in range(high - low):
                then = self._add(None, self._sequence(part, then), then)
        for _ in range(low):
            then = self._sequence(part, then)
        return then


def _test(code: str, value: Any) -> _Test:
    """Whether one letter matches."""
    if code == "LITERAL":
        return lambda letter: ord(letter) == value
    if code == "NOT_LITERAL":
        return lambda letter: ord(letter) != value
    if code == "ANY":
        return lambda letter: letter != "\n"
    if code == "RANGE":
        return lambda letter: value[0] <= ord(letter) <= value[1]
    if code == "CATEGORY":
        form = _CATEGORIES[str(value)]
        return lambda letter: form.match(letter) is not None
    if code == "IN":
        negated = str(value[0][0]) == "NEGATE"
        tests = [_test(str(each), what) for each, what in value[negated:]]
        return lambda letter: any(test(letter) for test in tests) != negated
    raise re.error(f"it needs what cannot be matched in bounded time ({code.lower()})")
