"""Regular expressions of users and of files, matched without ever taking 2ⁿ steps.

Python's ``re`` tries one way after the other, which for ``(a+)+b`` and the like takes 2ⁿ steps.
Patterns that could take long are matched by following all ways at once instead (K. Thompson,
Regular expression search algorithm, CACM 11(6), 1968).
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from math import inf, log2
from typing import Any

# The parser of ``re``, which has no public name.
_SRE: Any = importlib.import_module("re._parser")
#: Most states of one pattern, counted repeats written out.
STATES = 500
_KNOWN = 1000
#: Letters of a name of which ways are counted, and the most ways that ``re`` may try (in bits):
#: two repeats at will, or little more than three where nothing but ``re`` can do it.
_LETTERS, _QUICK, _MOST = 128, 14.0, 24.0
_CATEGORIES = {
    f"CATEGORY_{name}{word}": re.compile(sign)
    for word, (yes, no) in {
        "DIGIT": (r"\d", r"\D"), "SPACE": (r"\s", r"\S"), "WORD": (r"\w", r"\W")
    }.items()
    for name, sign in (("", yes), ("NOT_", no))
}  # fmt: skip
_BEGINNINGS = ("AT_BEGINNING", "AT_BEGINNING_STRING")
_ENDS = ("AT_END", "AT_END_STRING")
_Test = Callable[[str], bool]


def parsed(pattern: str) -> Any:
    """The tree of a pattern.

    Raises
    ------
    re.error
        If it is no regular expression.
    """
    try:
        # What future versions of Python will read differently is no news to the user of a file.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _SRE.parse(pattern)
    except (RecursionError, OverflowError) as error:
        raise re.error(str(error)) from None


def finder(pattern: str) -> Callable[[str], bool]:
    """A function that says whether a pattern is found anywhere in a text.

    Raises
    ------
    re.error
        If it is no regular expression, or one that could take ``re`` too long and that looks
        around or back, so that nothing else can match it.
    """
    tree = parsed(pattern)
    compiled = re.compile(pattern)
    ways = _ways(tree)
    if ways > _QUICK:
        try:
            return Machine(tree, anywhere=True).match
        except re.error:
            if ways > _MOST:
                raise
    return lambda text: compiled.search(text) is not None


def check_ways(pattern: str) -> None:
    """Refuse a pattern that could take ``re`` too long, where its groups are needed.

    Raises
    ------
    re.error
    """
    if _ways(parsed(pattern)) > _MOST:
        raise re.error("it can match in too many ways: repeats of repeats, or too many of them")


def choices(tree: Iterable[Any]) -> int:
    """How often a pattern must choose how far to go; many where it repeats a choice."""
    count = 0
    for code, value in tree:
        name = str(code)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, part = value
            inner = choices(part)
            count += (low != high) + inner * (2 if high != 1 else 1)
        elif name == "SUBPATTERN":
            count += choices(value[-1])
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            count += 2
    return count


def _ways(tree: Iterable[Any]) -> float:
    """Bits of the number of ways in which a pattern could match; infinite if exponential."""
    bits = aside = 0.0
    for code, value in tree:
        name = str(code)
        if name.endswith("_REPEAT"):
            low, high, part = value
            most = min(int(high), _LETTERS)
            inner = _ways(part)
            span = log2(max(most - min(low, most), 0) + 1)
            bits += span + (inner if most <= 1 or _delimited(part) else inner * most)
        elif name in ("SUBPATTERN", "ATOMIC_GROUP"):
            bits += _ways(value[-1] if name == "SUBPATTERN" else value)
        elif name in ("BRANCH", "GROUPREF_EXISTS"):
            parts = [part or () for part in (value[1] if name == "BRANCH" else value[1:])]
            bits += log2(sum(2.0 ** min(_ways(part), 1000.0) for part in parts))
        elif name in ("ASSERT", "ASSERT_NOT"):
            aside = max(aside, _ways(value[1]))
    return inf if bits > _LETTERS else max(bits, aside)


def _delimited(tree: Any) -> bool:
    """Whether each round of a repeat begins or ends with a letter that is nowhere else in it.

    With one more choice at most, the text then tells how each round matched.
    """
    items = list(tree)
    while len(items) == 1 and str(items[0][0]) == "SUBPATTERN":
        items = list(items[0][1][-1])
    for place in (0, -1) if items and choices(items) <= 1 else ():
        code, value = items[place]
        rest = items[1:] if place == 0 else items[:-1]
        if str(code) == "LITERAL" and not _accepts(rest, chr(value)):
            return True
    return False


def _accepts(tree: Iterable[Any], letter: str) -> bool:
    """Whether any part of a pattern could match a letter."""
    for code, value in tree:
        name = str(code)
        if name.endswith("_REPEAT") or name == "SUBPATTERN":
            found = _accepts(value[-1], letter)
        elif name == "BRANCH":
            found = any(_accepts(part, letter) for part in value[1])
        elif name == "AT":
            found = False
        else:
            try:
                found = _test(name, value)(letter)
            except re.error:
                found = True
        if found:
            return True
    return False


class Machine:
    """States in a list: ``(test, next)`` reads a letter, ``(None, nexts)`` goes on at once.

    ``starts`` are those that go on at the beginning only, ``ends`` at the end only.

    Parameters
    ----------
    tree : as :func:`parsed` gives it
    anywhere : bool, default False
        Whether the pattern may be found anywhere in a text, instead of being the whole text.

    Raises
    ------
    re.error
        If the pattern looks around or back, or is too large.
    """

    def __init__(self, tree: Any, *, anywhere: bool = False) -> None:
        flags = getattr(getattr(tree, "state", None), "flags", 0) & ~re.UNICODE
        if flags & ~re.IGNORECASE:
            raise re.error("it has flags that cannot be matched in bounded time")
        self.cased = not flags & re.IGNORECASE
        self.states: list[tuple[_Test | None, tuple[int, ...]]] = []
        self.starts: set[int] = set()
        self.ends: dict[int, bool] = {}
        self.end = self._add(None)
        start = self._sequence(tree, self.end)
        self.first = self._closed({start}, first=True)
        self.again = self._closed({start}) if anywhere else frozenset[int]()
        self.anywhere = anywhere
        self.known: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def match(self, text: str) -> bool:
        """Whether the text matches."""
        now = self.first
        for place, letter in enumerate(text):
            if self.anywhere and self.end in now:
                return True
            if letter == "\n" and place == len(text) - 1 and self.ends:
                now = self._closed(now, first=place == 0, last=1)
                if self.anywhere and self.end in now:
                    return True
            if (then := self.known.get((now, letter))) is None:
                reached: set[int] = set()
                for state in now:
                    test, nexts = self.states[state]
                    if test is not None and test(letter):
                        reached.update(nexts)
                if len(self.known) >= _KNOWN:
                    self.known.clear()
                then = self.known[now, letter] = self._closed(reached) | self.again
            if not (now := then):
                return False
        return self.end in (self._closed(now, first=not text, last=2) if self.ends else now)

    def _closed(
        self, states: Iterable[int], *, first: bool = False, last: int = 0
    ) -> frozenset[int]:
        found = set(states)
        left = list(found)
        while left:
            state = left.pop()
            test, nexts = self.states[state]
            if (
                test is None
                and (first or state not in self.starts)
                and (state not in self.ends or last > self.ends[state])
            ):
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
        if code == "AT" and str(value) in (*_BEGINNINGS, *_ENDS):
            state = self._add(None, then)
            if str(value) in _ENDS:
                # ``$`` is also before a line feed that ends the text.
                self.ends[state] = str(value) == "AT_END_STRING"
            else:
                self.starts.add(state)
            return state
        test = _test(code, value)
        if not self.cased:
            test = _uncased(code, value)
        return self._add(test, then)

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


def _uncased(code: str, value: Any) -> _Test:
    """The same of a letter in either case."""
    negated = code == "NOT_LITERAL" or (code == "IN" and str(value[0][0]) == "NEGATE")
    if code == "NOT_LITERAL":
        code = "LITERAL"
    elif negated:
        value = value[1:]
    test = _test(code, value)
    return lambda letter: (
        any(map(test, {letter, letter.lower()[:1], letter.upper()[:1]})) != negated
    )
