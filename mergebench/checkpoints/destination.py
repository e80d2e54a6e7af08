"""Where an output is to appear: whether it may, and the hidden names beside it."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.disk import taken_bytes
from mergebench.checkpoints.journal import Head, read_journal
from mergebench.checkpoints.replacing import find_foreign
from mergebench.core.errors import MergebenchError

#: Characters of a name that hidden names keep.
_LONGEST = 50


def resolve(destination: Path, *, single_file: bool) -> Path:
    """The absolute place of an output: a link to a folder is followed, one to a file replaced."""
    if single_file:
        return destination.parent.resolve() / destination.name
    return destination.resolve()


def check_destination(
    destination: Path, *, single_file: bool, force: bool, key: str | None = None
) -> None:
    """Refuse a destination that exists, unless it may be replaced; nothing is written.

    Parameters
    ----------
    destination : Path
        Where the output is to appear.
    single_file : bool
        Whether a file is to be written there, rather than a folder.
    force : bool
        Allow to replace a file, or a folder that is empty or holds a model or an adapter and
        nothing else.
    key : str, optional
        Allow what a run with this key has put there before it was killed.

    Raises
    ------
    MergebenchError
        If it may not be written there.
    """
    place = resolve(destination, single_file=single_file)
    if not os.path.lexists(place) or _is_finished(place, key):
        return
    if single_file == (place.is_dir() and not place.is_symlink()):
        is_a, wanted = ("folder", "file") if single_file else ("file", "folder")
        raise MergebenchError(
            f"{destination}: is a {is_a}, and a {wanted} is to be written",
            fix="choose another name",
        )
    if not force:
        raise MergebenchError(
            f"{destination}: exists already", fix="choose another name, or pass --force"
        )
    try:
        foreign = None if single_file else find_foreign(place)
    except OSError as error:
        raise cannot("listed", destination, error) from error
    if foreign is not None:
        raise MergebenchError(
            f"{destination}: is not replaced, because it holds more than a model or an adapter",
            got=str(foreign),
            fix="move that away, or choose another name",
        )


@dataclass(frozen=True)
class Hidden:
    """Where an output is made, under names that the next run finds again.

    Attributes
    ----------
    part, journal, lock : Path
    old : Path
        What is being replaced, where the system cannot exchange two folders in one step. It
        comes back if the run is killed before its successor stands.
    trash : Path
        What nobody needs any more.
    room : Path
        What processes that make the output together leave for each other: a folder.
    """

    part: Path
    journal: Path
    lock: Path
    old: Path
    trash: Path
    room: Path

    @classmethod
    def beside(cls, place: Path, mark: str = "") -> Self:
        """The hidden names of a place; ``mark`` sets those of one run apart from all others."""
        name = place.name
        # Names have at most 255 bytes, and a character up to 4.
        if len(name) > _LONGEST:
            name = f"{name[: _LONGEST - 9]}~{zlib.crc32(name.encode(errors='surrogateescape')):08x}"
        stem = f".{name}.mergebench-{mark}"
        ends = ("part", "journal", "lock", "old", "trash", "room")
        return cls(*(place.with_name(stem + end) for end in ends))


def staged_bytes(destination: Path, *, single_file: bool) -> int:
    """Bytes on the disk that earlier runs hold for an output: this run uses them, or frees them.

    Parameters
    ----------
    destination : Path
        Where the output is to appear.
    single_file : bool
        Whether it is a file, rather than a folder.
    """
    return taken_bytes(Hidden.beside(resolve(destination, single_file=single_file)).part)


def _is_finished(place: Path, key: str | None) -> bool:
    if key is None:
        return False
    past = read_journal(Hidden.beside(place).journal)
    return past is not None and past.head == Head(key, inode(place))


def inode(path: Path) -> int:
    """Of the file or folder itself, not of what a link leads to; -1 where there is none."""
    try:
        return path.lstat().st_ino
    except OSError:
        return -1
