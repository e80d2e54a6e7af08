"""What changes a shelf: its lock, objects stored, entries placed and taken off.

Every step is one rename, so that a process that dies leaves nothing that is half there.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from mergebench.checkpoints.descriptors import Handle, cannot
from mergebench.checkpoints.disk import check_space, disk_errors, flush, remove, sync_folder
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
)
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.ship.shelf import ABOUT, MARK, Entry, Progress, check_name, entry, is_shelf

#: Seconds to wait for another process that changes the shelf.
PATIENCE = 600.0


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
            used = shelf.exists() and any(not each.name.startswith(".") for each in shelf.iterdir())
            # Others may make it meanwhile: their mark is the first thing that appears.
            if used and not is_shelf(shelf):
                raise MergebenchError(
                    f"{shelf}: is no shelf, and not empty", fix="name another folder with --shelf"
                )
            shelf.mkdir(parents=True, exist_ok=True)
            write_synced(shelf / MARK, [b'{"shelf": 1}\n'])
        for folder in (shelf / OBJECTS, shelf / ENTRIES):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot("made", shelf, error) from error


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
