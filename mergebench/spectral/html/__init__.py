"""Reports to look at: one page, or pictures for papers. Needs the extra ``report``.

Nothing here imports matplotlib or jinja2 until something is written.
"""

from __future__ import annotations

from pathlib import Path

from mergebench.checkpoints.descriptors import cannot
from mergebench.pages import DOTS, PAGE, PICTURES, need, write_picture, write_text
from mergebench.spectral.report import Record


def write_page(data: Record, path: Path) -> None:
    """Write a report, as ``Report.to_json`` gives it, as one page that needs nothing else.

    Parameters
    ----------
    data : record
    path : Path
        Appears whole or not at all; what is there is replaced.

    Raises
    ------
    MergebenchError
        If the extra is missing or the system refuses.
    """
    need("--html", PAGE)
    from mergebench.spectral.html.page import page

    write_text(path, page(data))


def write_pictures(data: Record, path: Path) -> list[Path]:
    """Write pictures of a report into a folder, 300 dots per inch.

    ``NAME.png`` maps a number by layer and module, ``singular-values.png`` has curves, and
    ``models-NAME.png`` what models have to do with each other.

    Returns
    -------
    list of Path
        What was written; nothing where there is neither a matrix nor a pair.

    Raises
    ------
    MergebenchError
        If the extra is missing or the system refuses.
    """
    need("--png", PICTURES)
    from mergebench.spectral.html.pictures import pictures

    drawn = pictures(data, DOTS)
    written: list[Path] = []
    try:
        if drawn:
            path.mkdir(exist_ok=True)
        for name, content in drawn:
            write_picture(path / f"{name}.png", content)
            written.append(path / f"{name}.png")
    except OSError as error:
        raise cannot("written", path, error) from error
    return written
