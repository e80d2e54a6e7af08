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

import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mergebench.checkpoints.containers import SHELVED
from mergebench.checkpoints.descriptors import Handle, cannot
from mergebench.checkpoints.disk import check_space, disk_errors, flush, remove, sync_folder
from mergebench.checkpoints.documents import read_object
from mergebench.checkpoints.locks import acquire
from mergebench.checkpoints.reader import SafetensorsFile, open_safetensors
from mergebench.checkpoints.replacing import swap_in
from mergebench.checkpoints.shelved import (
    ENTRIES,
    OBJECTS,
    Piece,
    Shelved,
    cuts,
    digest_of,
    object_place,
    read_shelved,
)
from mergebench.core.errors import FormatError, MergebenchError, ParameterError, did_you_mean

MARK, ABOUT = "mergebench_shelf.json", "mergebench_entry.json"
#: Seconds to wait for another process that changes the shelf.
PATIENCE = 600.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
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
    if not _NAME.fullmatch(name) or name.endswith("."):
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


@contextmanager
def locked(shelf: Path) -> Iterator[None]:
    """Hold the lock of a shelf, which is made if there is none; wait for others.

    Raises
    ------
    MergebenchError
        If the folder is something else, if it has no locks, or if others take too long.
    """
    _make(shelf)
    end = time.monotonic() + PATIENCE
    while True:
        try:
            lock = acquire(shelf / ".lock", shelf)
            break
        except MergebenchError as error:
            if "another run" not in error.what or time.monotonic() > end:
                raise
            time.sleep(0.05)
    if lock is None:
        raise MergebenchError(
            f"{shelf}: the disk has no locks, without which a shelf is not safe",
            fix="put the shelf on another disk",
        )
    try:
        with disk_errors(shelf, 0):
            yield
    finally:
        lock.release()


def _make(shelf: Path) -> None:
    try:
        if not is_shelf(shelf):
            if shelf.exists() and any(not each.name.startswith(".") for each in shelf.iterdir()):
                raise MergebenchError(
                    f"{shelf}: is no shelf, and not empty", fix="name another folder with --shelf"
                )
            shelf.mkdir(parents=True, exist_ok=True)
            write_synced(shelf / MARK, [b'{"shelf": 1}\n'])
        for folder in (shelf / OBJECTS, shelf / ENTRIES):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot("made", shelf, error) from error


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
    return [_read(shelf, name) for name in names if _NAME.fullmatch(name)]


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
            [e.name for e in folder.iterdir() if _NAME.fullmatch(e.name)] if folder.is_dir() else []
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


def store(shelf: Path, path: Path, progress: Progress | None = None) -> Shelved:
    """Put the objects of a file on a shelf, whose lock is held.

    Parameters
    ----------
    shelf, path : Path
    progress : callable, optional

    Raises
    ------
    FormatError
        If it is no sound safetensors file.
    OSError
    """
    file: SafetensorsFile = open_safetensors(path)
    handle, folders = Handle(path), set()
    first = next(iter(file.tensors.values()), None)
    head = file.size if first is None else first.offset
    edges = cuts(head, list(file.tensors.values()), file.size)
    check_space(shelf, file.size)
    pieces = []
    for start, stop in pairwise(edges):
        data = bytearray(stop - start)
        if handle.read_at(memoryview(data), start) < len(data):
            raise FormatError(f"{path}: was cut while it was read", fix="add it again")
        piece = Piece(digest_of(memoryview(data)), len(data))
        pieces.append(piece)
        place = object_place(shelf, piece.digest)
        if not _stands(place, piece):
            _put(shelf, place, data)
            folders.add(place.parent)
        if progress is not None:
            progress("adding", stop, file.size)
    for folder in folders:
        sync_folder(folder)
    sync_folder(shelf / OBJECTS)
    return Shelved(path, path.name, tuple(pieces))


def _stands(place: Path, piece: Piece) -> bool:
    """Whether an object is there and sound: adding again is how a damaged one is mended."""
    if not place.is_file() or place.stat().st_size != piece.size:
        return False
    return digest_of(place.read_bytes()) == piece.digest


def _put(shelf: Path, place: Path, data: bytes | bytearray) -> None:
    place.parent.mkdir(exist_ok=True)
    part = shelf / OBJECTS / f".{place.parent.name}{place.name[:16]}-{secrets.token_hex(4)}-part"
    write_synced(part, [data])
    part.replace(place)


def write_synced(path: Path, pieces: Iterable[bytes | bytearray]) -> None:
    """A new file, on the disk when this returns."""
    with path.open("wb") as file:
        for each in pieces:
            file.write(each)
        file.flush()
        flush(file.fileno())


def place_entry(
    shelf: Path,
    name: str,
    files: Mapping[str, bytes],
    about: Mapping[str, Any],
    *,
    force: bool = False,
) -> None:
    """Let an entry appear whose objects stand; the lock is held.

    Raises
    ------
    MergebenchError
        If the name is taken, unless ``force`` is given.
    OSError
    """
    place = shelf / ENTRIES / check_name(name)
    refuse_taken(place, force=force)
    part = place.with_name(f".{name}-{secrets.token_hex(4)}-part")
    part.mkdir()
    for each, data in {**files, ABOUT: (json.dumps(dict(about), indent=1) + "\n").encode()}.items():
        write_synced(part / each, [data])
    sync_folder(part)
    trash = swap_in(part, place, place.with_name(f".{name}-old"), place.with_name(f".{name}-trash"))
    sync_folder(place.parent)
    if trash is not None:
        remove(trash)


def refuse_taken(place: Path, *, force: bool) -> None:
    """Refuse a name that is taken."""
    if place.exists() and not force:
        raise MergebenchError(
            f"{place.name}: is on the shelf already",
            fix="choose another name with --as, or pass --force",
        )


def mend(shelf: Path) -> int:
    """Undo what dead processes have begun; the lock is held. How much that was."""
    count = 0
    for each in [*(shelf / ENTRIES).iterdir(), *(shelf / OBJECTS).iterdir()]:
        if not each.name.startswith("."):
            continue
        count += 1
        place = each.with_name(each.name.removeprefix(".").removesuffix("-old"))
        if each.name.endswith("-old") and not place.exists():
            each.rename(place)
        elif each.name.endswith(("-part", "-trash", "-old")):
            remove(each)
    return count


def take_off(shelf: Path, name: str) -> Entry:
    """Remove an entry; its objects stay until :func:`~mergebench.ship.shelf_care.collect`.

    Raises
    ------
    MergebenchError
        If there is none of this name.
    """
    with locked(shelf):
        mend(shelf)
        found = entry(shelf, name)
        trash = found.path.with_name(f".{name}-{secrets.token_hex(4)}-trash")
        found.path.rename(trash)
        sync_folder(trash.parent)
        remove(trash)
    return found
