"""A shelf looked after: what nothing refers to taken away, bytes compared, adapters brought out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mergebench.checkpoints.disk import disk_errors
from mergebench.checkpoints.shelved import OBJECTS, Shelved, digest_of
from mergebench.checkpoints.staging import Stage
from mergebench.core.errors import FormatError
from mergebench.ship.shelf import Entry, Progress, entries, is_shelf
from mergebench.ship.shelf_changes import locked, mend, write_synced


@dataclass(frozen=True)
class Collected:
    """What was, or would be, taken away: objects, their bytes, and what dead processes left."""

    objects: int
    bytes: int
    leftovers: int


def collect(shelf: Path, *, dry_run: bool = False) -> Collected:
    """Take away objects that no entry refers to, and what dead processes have left.

    Raises
    ------
    MergebenchError
        If an entry cannot be read: then nobody knows what it refers to, and nothing goes.
    """
    if not is_shelf(shelf):
        return Collected(0, 0, 0)
    with locked(shelf):
        leftovers = 0 if dry_run else mend(shelf)
        kept = {piece.digest for each in entries(shelf) for piece in each.pieces}
        count = size = 0
        for place in objects(shelf):
            if place.parent.name + place.name in kept:
                continue
            count, size = count + 1, size + place.stat().st_size
            if not dry_run:
                place.unlink()
        return Collected(count, size, leftovers)


def objects(shelf: Path) -> list[Path]:
    """Every object of a shelf."""
    if not (shelf / OBJECTS).is_dir():
        return []
    folders = sorted(each for each in (shelf / OBJECTS).iterdir() if len(each.name) == 2)
    return [each for folder in folders for each in sorted(folder.iterdir())]


def disk_bytes(shelf: Path) -> int:
    """Bytes of all objects and of the files beside the weights."""
    beside = sum(sum(each.beside.values()) for each in entries(shelf))
    return sum(each.stat().st_size for each in objects(shelf)) + beside


def damage(found: Entry, progress: Progress | None = None) -> list[str]:
    """What of an entry is not as it was added: every object is read."""
    wrong = []
    total, done = sum(piece.size for piece in found.pieces), 0
    for file in found.files:
        for piece in dict.fromkeys(file.pieces):
            place = file.place(piece)
            try:
                data = place.read_bytes()
            except OSError as error:
                wrong.append(f"{found.name}: {file.file}: {place}: {error.strerror}")
                continue
            if digest_of(data) != piece.digest:
                wrong.append(f"{found.name}: {file.file}: {place}: its bytes have changed")
            done += piece.size
            if progress is not None:
                progress("verifying", min(done, total), total)
    return wrong


def export(found: Entry, out: Path, *, force: bool = False) -> int:
    """Write an entry as the files it was added from, byte for byte; how many bytes that was.

    Raises
    ------
    MergebenchError
        If an object is damaged, or if the place is taken.
    """
    stage = Stage(out, single_file=False, force=force, key=None)
    stage.open(found.size, lambda _: False)
    try:
        with disk_errors(out, found.size):
            for name in found.beside:
                write_synced(stage.part / name, [(found.path / name).read_bytes()])
            for file in found.files:
                write_synced(stage.part / file.file, _sound(file))
        stage.seal()
        stage.swap()
    except BaseException:
        stage.leave(keep=False)
        raise
    stage.forget()
    return found.size


def _sound(file: Shelved) -> Iterator[bytes]:
    """The objects of a file, each compared with its digest."""
    for piece in file.pieces:
        data = file.place(piece).read_bytes()
        if digest_of(data) != piece.digest:
            raise FormatError(
                f"{file.path}: an object of it is damaged",
                got=str(file.place(piece)),
                fix="add the adapter to the shelf again, with --force",
            )
        yield data
