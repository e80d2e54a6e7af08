"""Regular expressions that stand in files, matched in time proportional to the text."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from mergebench.core.regular import Machine, choices, parsed

#: Most patterns of one config that are more than a name.
PATTERNS = 256
_PLAIN = re.compile(r"[\w.-]+")


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
    tree, own = parsed(whole), parsed(pattern)
    # One choice of the pattern's own, and that of where it begins, is at most the length squared.
    if choices(own) <= 1:
        compiled = re.compile(whole)
        return lambda text: compiled.match(text) is not None
    return Machine(tree).match
