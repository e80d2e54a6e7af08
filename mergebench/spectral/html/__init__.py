"""Reports to look at: one page, or pictures for papers. Needs the extra ``report``.

Nothing here imports matplotlib or jinja2 until something is written.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from mergebench.checkpoints.descriptors import cannot
from mergebench.core.errors import MergebenchError
from mergebench.packages import install_line
from mergebench.spectral.files import replaced, write_bytes
from mergebench.spectral.report import Record

#: What a page and pictures need, as modules.
PAGE, PICTURES = ("jinja2", "matplotlib"), ("matplotlib",)
_DOTS = 300
_ENDINGS = (".html", ".htm")


def check_page(path: Path, force: bool) -> None:
    """Refuse a page that could not be written, before any work.

    Raises
    ------
    MergebenchError
        If the extra is missing, the name does not end in ``.html``, its folder does not exist, or
        something would be replaced without ``force``.
    """
    _need("--html", PAGE)
    if path.suffix.lower() not in _ENDINGS:
        raise MergebenchError(
            f"--html {path}: is no name of a page", fix="give one that ends in .html"
        )
    if not path.parent.is_dir():
        raise MergebenchError(f"--html {path}: {path.parent} is no folder", fix="make it first")
    if path.is_dir():
        raise MergebenchError(f"--html {path}: is a folder", fix="name a file in it")
    if path.exists() and not force:
        raise MergebenchError(
            f"--html {path}: exists", fix="give another name, or --force to replace it"
        )


def check_pictures(path: Path, force: bool) -> None:
    """Refuse a folder for pictures that could not be written to, before any work.

    Raises
    ------
    MergebenchError
        If the extra is missing, the folder that is to hold it does not exist, it is no folder, or
        a picture stands in it and ``force`` is not given.
    """
    _need("--png", PICTURES)
    if not path.parent.is_dir():
        raise MergebenchError(f"--png {path}: {path.parent} is no folder", fix="make it first")
    if path.exists() and not path.is_dir():
        raise MergebenchError(f"--png {path}: is a file", fix="give a folder")
    there = sorted(path.glob("*.png")) if path.is_dir() else []
    if there and not force:
        raise MergebenchError(
            f"--png {path}: {there[0]} exists", fix="give another folder, or --force to replace it"
        )


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
    _need("--html", PAGE)
    from mergebench.spectral.html.page import page

    text = page(data)
    try:
        with replaced(path) as file:
            file.write(text)
    except OSError as error:
        raise cannot("written", path, error) from error


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
    _need("--png", PICTURES)
    from mergebench.spectral.html.pictures import pictures

    drawn = pictures(data, _DOTS)
    written: list[Path] = []
    try:
        if drawn:
            path.mkdir(exist_ok=True)
        for name, content in drawn:
            write_bytes(path / f"{name}.png", content)
            written.append(path / f"{name}.png")
    except OSError as error:
        raise cannot("written", path, error) from error
    return written


def _need(option: str, modules: Collection[str]) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MergebenchError(
            f"{option} needs {' and '.join(missing)}", fix=f"run {install_line('report')}"
        )
