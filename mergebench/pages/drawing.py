"""What every picture is drawn with: inks that a page or paper replaces, and no global state."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from io import BytesIO

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font

from mergebench.core.text import cell

#: Most things that have an ink of their own.
MOST = 6
#: Inks: what is drawn in them takes the colours of the page, light or dark.
INK, GRID = "#000001", "#000002"
SERIES = tuple(f"#00010{number}" for number in range(MOST))
#: The same on paper: Okabe & Ito's, which the colour-blind tell apart, darkened; dashes do it too.
PAPER = {
    INK: "#222222", GRID: "#cccccc",
    **dict(zip(SERIES, ("#0072b2", "#c04a00", "#007a5a", "#a8447f", "#8a6500", "#4d4d4d"),
               strict=True)),
}  # fmt: skip
SCREEN = dict(zip(PAPER, PAPER, strict=True))
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (8, 3)), (0, (3, 3)))
_LONG = 48


def plain_style() -> AbstractContextManager[None]:
    """Whatever settings of matplotlib a user has, the same report gives the same pictures."""
    ours = {"svg.fonttype": "none", "svg.hashsalt": "mergebench"}
    return style.context(["default", ours])


def png(figure: Figure, dots: int) -> bytes:
    """A figure as PNG with so many dots per inch."""
    file = BytesIO()
    # Without the version of matplotlib in it, the same report gives the same bytes.
    figure.savefig(file, format="png", dpi=dots, metadata={"Software": None})
    return file.getvalue()


def plain_name(text: str, longest: int = _LONG) -> str:
    """A name as matplotlib draws it: no formulas, and what the font lacks spelt out."""
    safe = "".join(each if _drawn(each) else f"\\u{ord(each):04x}" for each in cell(text))
    half = longest // 2
    short = safe if len(safe) <= longest else f"{safe[:half]}…{safe[-half:]}"
    return short.replace("$", r"\$")


def _drawn(letter: str) -> bool:
    return letter.isascii() or _font().get_char_index(ord(letter)) != 0


@cache
def _font() -> FT2Font:
    return FT2Font(findfont(FontProperties(family="DejaVu Sans")))
