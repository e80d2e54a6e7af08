"""A shelf of adapters: what they have in common is stored once, and nothing is ever half there.

::

    shelf/
      mergebench_shelf.json                      what this folder is
      objects/ab/cdef…                           headers and tensors, by their digest
      adapters/NAME/adapter_config.json          files beside the weights, as they were
      adapters/NAME/adapter_model.safetensors.shelf   which objects the weights are

An object is written under another name, brought to the disk and renamed; only when all of them
stand does the entry appear, by one rename as well. So a process that dies leaves objects that
nothing refers to, which :func:`~mergebench.ship.shelf_care.collect` takes away, and never an entry
without its objects. What changes a shelf waits for its lock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.checkpoints.containers import SHELVED
from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.documents import read_object
from mergebench.checkpoints.shelved import ENTRIES, Piece, Shelved, read_shelved
from mergebench.core.errors import MergebenchError, ParameterError, did_you_mean

MARK, ABOUT = "mergebench_shelf.json", "mergebench_entry.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Entry:
    """An adapter on a shelf.

    Attributes
    ----------
    name : str
    path : Path
        A folder that takes the place of the adapter's.
    files : tuple of Shelved
    beside : mapping of name to size
        Files beside the weights.
    about : mapping
        What was noted when it was added: source, commit, kind, base, uncompressed bytes.
    """

    name: str
    path: Path
    files: tuple[Shelved, ...]
    beside: Mapping[str, int]
    about: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all its files, as if they were stored by themselves."""
        return sum(each.size for each in self.files) + sum(self.beside.values())

    @property
    def uncompressed(self) -> int:
        """Bytes of what it was packed from; its own size if it is not packed."""
        found = self.about.get("uncompressed")
        return found if type(found) is int else self.size

    @property
    def pieces(self) -> set[Piece]:
        """Its objects."""
        return {piece for file in self.files for piece in file.pieces}


def default_shelf(environment: Mapping[str, str]) -> Path:
    """``$XDG_DATA_HOME/mergebench/shelf``, or the same below ``~/.local/share``."""
    home = environment.get("XDG_DATA_HOME")
    data = Path(home) if home else Path("~/.local/share").expanduser()
    return data / "mergebench" / "shelf"


def check_name(name: str) -> str:
    """A name that is one on every file system.

    Raises
    ------
    ParameterError
    """
    if not NAME.fullmatch(name) or name.endswith("."):
        raise ParameterError(
            f"{name!r}: is no name on a shelf",
            expected="up to 100 letters, digits, '.', '_' and '-', of which the first is no sign",
            fix="choose another with --as",
        )
    return name


def name_for(reference: str) -> str:
    """A name made of the last part of a reference."""
    last = Path(reference.rstrip("/").split("@")[0]).name
    last = last.removesuffix(".safetensors").removesuffix(".mbz")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip(".-_")[:100] or "adapter"


def is_shelf(shelf: Path) -> bool:
    """Whether a folder is a shelf."""
    return (shelf / MARK).is_file()


def entries(shelf: Path) -> list[Entry]:
    """All adapters of a shelf, by name.

    Raises
    ------
    MergebenchError
        If one of them is damaged.
    """
    if not (shelf / ENTRIES).is_dir():
        return []
    try:
        names = sorted(each.name for each in (shelf / ENTRIES).iterdir())
    except OSError as error:
        raise cannot("listed", shelf / ENTRIES, error) from error
    return [_read(shelf, name) for name in names if NAME.fullmatch(name)]


def entry(shelf: Path, name: str) -> Entry:
    """One adapter.

    Raises
    ------
    MergebenchError
        If there is none of this name.
    """
    check_name(name)
    if not (shelf / ENTRIES / name).is_dir():
        folder = shelf / ENTRIES
        known = (
            [e.name for e in folder.iterdir() if NAME.fullmatch(e.name)] if folder.is_dir() else []
        )
        raise MergebenchError(f"{name}: is not on the shelf {shelf}", fix=did_you_mean(name, known))
    return _read(shelf, name)


def _read(shelf: Path, name: str) -> Entry:
    folder = shelf / ENTRIES / name
    listed = sorted(each for each in folder.iterdir() if each.is_file())
    files = tuple(read_shelved(each) for each in listed if each.name.endswith(SHELVED))
    beside = {
        each.name: each.stat().st_size
        for each in listed
        if not each.name.endswith(SHELVED) and each.name != ABOUT
    }
    about = read_object(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    return Entry(name, folder, files, beside, about)
