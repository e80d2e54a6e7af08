"""Comparisons and searches to look at: one page, one picture. Needs the extra ``report``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.pages import DOTS, write_picture, write_text


def write_comparison(
    data: Mapping[str, Any], page: Path | None = None, picture: Path | None = None
) -> None:
    """Write a comparison, as ``Comparison.to_json`` gives it.

    Parameters
    ----------
    data : mapping
    page, picture : Path, optional
        An HTML file that needs nothing else, and a PNG; each appears whole or not at all.

    Raises
    ------
    MergebenchError
        If the system refuses.
    """
    if page is not None:
        from mergebench.merge.fit.html.comparison import comparison_page

        write_text(page, comparison_page(data))
    if picture is not None:
        from mergebench.merge.fit.html.comparison import comparison_picture

        write_picture(picture, comparison_picture(data, DOTS))


def write_history(
    data: Mapping[str, Any], page: Path | None = None, picture: Path | None = None
) -> None:
    """Write what a search has tried, as ``Found.to_json`` gives it, or a grid, as ``record`` does.

    Parameters
    ----------
    data, page, picture
        As for :func:`write_comparison`.

    Raises
    ------
    MergebenchError
        If the system refuses.
    """
    if page is not None:
        from mergebench.merge.fit.html.history import history_page

        write_text(page, history_page(data))
    if picture is not None:
        from mergebench.merge.fit.html.history import history_picture

        write_picture(picture, history_picture(data, DOTS))
