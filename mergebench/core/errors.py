"""One root class for everything mergebench refuses, so that callers need one ``except``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FINDINGS = 1
EXIT_USER = 2
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

# Names and values come from files, which may make them of any length.
_LONGEST = 2000


class MergebenchError(Exception):
    """Something the user can fix.

    Parameters
    ----------
    what : str
        One sentence saying what is wrong, with the place (file, tensor, option) first.
    got, expected : str, optional
        What was found and what was needed.
    fix : str, optional
        The next step, worded as an instruction.
    lacks : str, optional
        What the user has to give beside a file that is sound in itself: ``base`` or ``alpha``.
    """

    def __init__(
        self, what: str, *, got: str = "", expected: str = "", fix: str = "", lacks: str = ""
    ) -> None:
        self.lacks = lacks
        self.what, self.got = shortened(what), shortened(got)
        self.expected, self.fix = shortened(expected), shortened(fix)
        parts = [self.what]
        if expected:
            parts.append(f"expected {self.expected}")
        if got:
            parts.append(f"got {self.got}")
        text = ", ".join(parts)
        super().__init__(f"{text}; {self.fix}" if fix else text)


def shortened(text: str, longest: int = _LONGEST) -> str:
    """A text without its middle where it is longer than ``longest`` characters."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … ({len(text) - 2 * half} characters left out) … {text[-half:]}"


class ParameterError(MergebenchError):
    """A method, op or option was given a value outside what it declares."""


class FormatError(MergebenchError):
    """A file is not what its name or its header says."""


class MismatchError(MergebenchError):
    """Inputs disagree: names, shapes, dtypes, bases."""


class ResourceError(MergebenchError):
    """Not enough memory or disk for the plan."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint naming the closest known name, or the known names if none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names) if names else "none are known"
