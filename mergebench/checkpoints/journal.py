"""What an interrupted run has done, on disk: an append-only file of lines ``crc32 json``.

The first line says to what the rest belongs; each of the others adds what has been finished or
measured. A line counts if its checksum holds and all before it count, so a line that a killed
process or a power cut has torn costs itself and nothing else. It is plain JSON, and nothing in
it is executed.

Data are on the disk before the line that calls them finished is written (see the recorder).
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from mergebench.checkpoints.descriptors import WRITE
from mergebench.checkpoints.disk import flush

#: Of the format.
VERSION = 1
#: Longest line and longest file that is read, in bytes.
LINE, FILE = 1 << 20, 1 << 28
_LINE = re.compile(rb"([0-9a-f]{8}) (.*)\n", re.DOTALL)


@dataclass(frozen=True)
class Head:
    """To what a journal belongs.

    Attributes
    ----------
    key : str
        Names everything that decides the bytes of the output.
    place : int
        Inode of the staged file or folder, which stays the same when it is renamed.
    """

    key: str
    place: int


@dataclass
class Past:
    """What a journal says.

    Attributes
    ----------
    head : Head
    finished : dict of tensor name to digest
    settled : dict of name to JSON value
    length : int
        Bytes up to the end of the last sound line.
    """

    head: Head
    finished: dict[str, str] = field(default_factory=dict)
    settled: dict[str, Any] = field(default_factory=dict)
    length: int = 0

    @property
    def empty(self) -> bool:
        """Whether nothing has been done."""
        return not self.finished and not self.settled


def read_journal(path: Path) -> Past | None:
    """The sound beginning of a journal; ``None`` where there is none, or one we cannot read."""
    try:
        with open(path, "rb", opener=_no_link) as file:
            return _read(file)
    except OSError:
        return None


def _no_link(path: str, flags: int) -> int:
    # A pipe would wait for a writer that never comes.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _read(file: BinaryIO) -> Past | None:
    past: Past | None = None
    while (record := _parse(line := file.readline(LINE))) is not None:
        if past is None:
            if (head := _head(record)) is None:
                return None
            past = Past(head)
        elif not _take(past, record):
            break
        past.length += len(line)
        if past.length > FILE:
            return None
    return past


def _parse(line: bytes) -> Any:
    match = _LINE.fullmatch(line)
    if match is None or int(match[1], 16) != zlib.crc32(match[2]):
        return None
    try:
        return json.loads(match[2])
    except (ValueError, RecursionError):
        return None


def _head(record: Any) -> Head | None:
    if not isinstance(record, dict) or record.get("journal") != VERSION:
        return None
    key, place = record.get("key"), record.get("place")
    return Head(key, place) if isinstance(key, str) and isinstance(place, int) else None


def _take(past: Past, record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    finished, settled = record.get("finished", {}), record.get("settled", {})
    if not isinstance(finished, dict) or not isinstance(settled, dict):
        return False
    if not all(isinstance(digest, str) for digest in finished.values()):
        return False
    past.finished.update(finished)
    past.settled.update(settled)
    return True


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _lines(kind: str, entries: Mapping[str, Any]) -> Iterator[bytes]:
    """Records of one kind, as many to a line as fit; what is too long for a line is left out."""
    batch: dict[str, Any] = {}
    size = 0
    for name, value in entries.items():
        length = len(_line({kind: {name: value}}))
        if length > LINE:
            continue
        if size + length > LINE:
            yield _line({kind: batch})
            batch, size = {}, 0
        batch[name] = value
        size += length
    if batch:
        yield _line({kind: batch})


class Journal:
    """A journal open for appending."""

    def __init__(self, path: Path, fd: int, length: int) -> None:
        self._path, self._fd, self._length = path, fd, length

    @classmethod
    def start(cls, path: Path, head: Head) -> Self:
        """Make a new journal, on the disk when this returns.

        Raises
        ------
        OSError
        """
        flags = WRITE | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        journal = cls(path, os.open(path, flags, 0o666), 0)
        try:
            journal._write(_line({"journal": VERSION, "key": head.key, "place": head.place}))
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def resume(cls, path: Path, past: Past) -> Self:
        """Open a journal that has been read; a damaged end is cut off.

        Raises
        ------
        OSError
        """
        fd = os.open(path, WRITE | getattr(os, "O_NOFOLLOW", 0))
        try:
            os.ftruncate(fd, past.length)
            flush(fd)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, past.length)

    def append(self, settled: Mapping[str, Any], finished: Mapping[str, str]) -> None:
        """Add records, which are on the disk when this returns.

        Parameters
        ----------
        settled : mapping of str to JSON value
        finished : mapping of tensor name to digest
            Of tensors whose data are on the disk.

        Raises
        ------
        OSError
            The journal then is as before.
        """
        # What was measured for a tensor stands before the news that it is finished.
        lines = b"".join((*_lines("settled", settled), *_lines("finished", finished)))
        if lines:
            self._write(lines)

    def _write(self, data: bytes) -> None:
        try:
            os.lseek(self._fd, self._length, os.SEEK_SET)
            done = 0
            while done < len(data):
                done += os.write(self._fd, data[done:])
            flush(self._fd)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, self._length)
            raise
        self._length += len(data)

    def close(self) -> None:
        """Close the file; nothing happens the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
