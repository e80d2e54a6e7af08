"""Names and numbers as people read them, wherever they are shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A name in a file is anybody's text. These make a terminal move its cursor, change its colours or
# title, or turn text around; halves of surrogate pairs cannot be printed at all.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""A text in which all that a terminal would act on, but for line ends, is spelt out.

    An escape character becomes ``\x1b``, one that turns text around ``\u202e``.
    """
    return UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else _spelt(found[0]), text)


def cell(value: Any) -> str:
    """A value on one line, line ends spelt out too."""
    return UNSAFE.sub(lambda found: _spelt(found[0]), str(value))


def _spelt(letter: str) -> str:
    return f"\\x{ord(letter):02x}" if ord(letter) < 256 else f"\\u{ord(letter):04x}"


def short_labels(labels: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    count = 1
    while count < 4:
        found = ["/".join(Path(label).parts[-count:]) for label in labels]
        if len(set(found)) == len(labels):
            return found
        count += 1
    return list(labels)


def written(value: Any) -> str:
    """A number for a table; – for ``None``, which stands for what is not defined."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.001 or size >= 1e5:
        return f"{value:.3g}"
    return f"{value:.4f}" if size < 1 else f"{value:.2f}" if size < 100 else f"{value:.1f}"
