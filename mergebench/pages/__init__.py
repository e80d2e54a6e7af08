"""Pages and pictures to look at, wherever their numbers come from. Needs the extra ``report``.

Nothing here imports matplotlib or jinja2 until something is drawn.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from mergebench.checkpoints.descriptors import cannot
from mergebench.core.errors import MergebenchError
from mergebench.packages import install_line
from mergebench.pages.files import replaced, write_bytes

#: What a page and pictures need, as modules.
PAGE, PICTURES = ("jinja2", "matplotlib"), ("matplotlib",)
#: Dots per inch of pictures.
DOTS = 300
_ENDINGS = (".html", ".htm")


def check_page(path: Path, force: bool) -> None:
    """Refuse a page that could not be written, before any work.

    Raises
    ------
    MergebenchError
        If the extra is missing, the name does not end in ``.html``, its folder does not exist, or
        something would be replaced without ``force``.
    """
    need("--html", PAGE)
    _check_file("--html", path, _ENDINGS, "page", force)


def check_pictures(path: Path, force: bool) -> None:
    """Refuse a folder for pictures that could not be written to, before any work.

    Raises
    ------
    MergebenchError
        If the extra is missing, the folder that is to hold it does not exist, it is no folder, or
        a picture stands in it and ``force`` is not given.
    """
    need("--png", PICTURES)
    if not path.parent.is_dir():
        raise MergebenchError(f"--png {path}: {path.parent} is no folder", fix="make it first")
    if path.exists() and not path.is_dir():
        raise MergebenchError(f"--png {path}: is a file", fix="give a folder")
    there = sorted(path.glob("*.png")) if path.is_dir() else []
    if there and not force:
        raise MergebenchError(
            f"--png {path}: {there[0]} exists", fix="give another folder, or --force to replace it"
        )


def check_picture(path: Path, force: bool) -> None:
    """Refuse a picture that could not be written, before any work.

    Raises
    ------
    MergebenchError
        As :func:`check_page`, for a name that ends in ``.png``.
    """
    need("--png", PICTURES)
    _check_file("--png", path, (".png",), "picture", force)


def _check_file(option: str, path: Path, endings: Collection[str], what: str, force: bool) -> None:
    if path.suffix.lower() not in endings:
        raise MergebenchError(
            f"{option} {path}: is no name of a {what}",
            fix=f"give one that ends in {next(iter(endings))}",
        )
    if not path.parent.is_dir():
        raise MergebenchError(f"{option} {path}: {path.parent} is no folder", fix="make it first")
    if path.is_dir():
        raise MergebenchError(f"{option} {path}: is a folder", fix="name a file in it")
    if path.exists() and not force:
        raise MergebenchError(
            f"{option} {path}: exists", fix="give another name, or --force to replace it"
        )


def write_text(path: Path, text: str) -> None:
    """Write a page, which appears whole or not at all; what is there is replaced.

    Raises
    ------
    MergebenchError
        If the system refuses.
    """
    try:
        with replaced(path) as file:
            file.write(text)
    except OSError as error:
        raise cannot("written", path, error) from error


def write_picture(path: Path, content: bytes) -> None:
    """Write a picture, which appears whole or not at all; what is there is replaced.

    Raises
    ------
    MergebenchError
        If the system refuses.
    """
    try:
        write_bytes(path, content)
    except OSError as error:
        raise cannot("written", path, error) from error


def need(option: str, modules: Collection[str]) -> None:
    """Refuse an option whose packages are missing.

    Raises
    ------
    MergebenchError
        Naming the extra.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MergebenchError(
            f"{option} needs {' and '.join(missing)}", fix=f"run {install_line('report')}"
        )
