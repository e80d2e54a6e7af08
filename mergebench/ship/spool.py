"""Blocks on their way into a file whose header must know how many bytes they take."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, Any, Self

import numpy as np

from mergebench.adapters_zoo.packing import ROW, Head, Packed, head_bytes, open_packed
from mergebench.checkpoints.descriptors import cannot
from mergebench.core.tensor import Array

_PIECE = 1 << 20


@dataclass(eq=False)
class Spool:
    """An unnamed file beside the output; gone when the process ends, however it ends."""

    folder: Path
    size: int = 0
    lock: Lock = field(default_factory=Lock)

    def __enter__(self) -> Self:
        """Create it.

        Raises
        ------
        MergebenchError
            If the system refuses.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self.folder)
        except OSError as error:
            raise cannot("written", self.folder, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def clear(self) -> None:
        """Forget what was added."""
        self.size = 0

    def add(self, data: bytes) -> int:
        """Append bytes; where they start."""
        at = self.size
        try:
            with self.lock:
                self._file.seek(at)
                self._file.write(data)
        except OSError as error:
            raise cannot("written", self.folder, error) from error
        self.size += len(data)
        return at

    def read(self, at: int, count: int) -> bytes:
        """Bytes from ``at`` on; any thread."""
        with self.lock:
            self._file.seek(at)
            return self._file.read(count)


@dataclass(frozen=True, eq=False)
class Spooled:
    """A packed tensor: head and table in memory, blocks in a spool; a Tensor of its bytes."""

    name: str
    head: Head
    start: bytes
    spool: Spool
    at: int
    length: int

    @property
    def dtype(self) -> str:
        """Always U8."""
        return "U8"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its bytes."""
        return (len(self.start) + self.length,)

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Bytes ``start:stop``."""
        del out
        cut = len(self.start)
        data = self.start[start:stop]
        if stop > cut:
            begin = max(start, cut)
            data += self.spool.read(self.at + begin - cut, stop - begin)
        return np.frombuffer(data, np.uint8)

    def opened(self, label: str) -> Packed:
        """As a reader of the file will open it."""
        return open_packed(label, self.name, self)

    def chunks(self) -> Iterator[tuple[int, Any]]:
        """All bytes with their places, a piece at a time."""
        (size,) = self.shape
        for start in range(0, size, _PIECE):
            yield start, self.read(start, min(start + _PIECE, size))


def spooled(name: str, head: Head, rows: list[Any], spool: Spool, at: int, length: int) -> Spooled:
    """A packed tensor of blocks that are in a spool."""
    table = np.array(rows, ROW)
    return Spooled(name, head, head_bytes(name, head, table), spool, at, length)
