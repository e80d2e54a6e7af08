"""Tensors written into an output that another process has opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from mergebench.checkpoints.descriptors import PUT, Handle
from mergebench.checkpoints.disk import disk_errors, flush
from mergebench.checkpoints.placement import Layout
from mergebench.checkpoints.spans import Spans
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import Array


@dataclass(frozen=True)
class Staged:
    """Where an output is being made.

    Attributes
    ----------
    root : str
        The staged file, or the folder.
    files : tuple of (name, inode)
        Of the folder; of a file that stands alone the name is empty.
    """

    root: str
    files: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, root: Path, names: Sequence[str] | None) -> Self:
        """What is there now; ``names`` is ``None`` for a single file.

        Raises
        ------
        OSError
            If a file is missing.
        """
        paths = [("", root)] if names is None else [(name, root / name) for name in names]
        return cls(str(root), tuple((name, path.stat().st_ino) for name, path in paths))

    def path(self, name: str) -> Path:
        """Of one of the files."""
        return Path(self.root) / name if name else Path(self.root)

    def is_here(self, root: Path) -> bool:
        """Whether these very files, and not others of their names, stand at ``root``."""
        paths = [(root / name if name else root, inode) for name, inode in self.files]
        return all(_inode(path) == inode for path, inode in paths)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return -1


class Placed:
    """Takes tensors for one output, at their places in files that are there already.

    A context manager; :meth:`digests` closes what has been written.

    Parameters
    ----------
    staged : Staged
    layout : Layout
        Of the same output.
    """

    def __init__(self, staged: Staged, layout: Layout) -> None:
        self.staged, self.layout = staged, layout
        self._inodes = dict(staged.files)
        self._handles: dict[str, Handle] = {}
        self._hashes: dict[str, Any] = {}
        self._spans = Spans()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.close()

    def write(self, name: str, byte_start: int, data: Array) -> None:
        """Write entries of a tensor, from its first byte to its last.

        Raises
        ------
        ResourceError
            If the disk is full.
        MergebenchError
            If the output is not the one that was opened, or the system refuses.
        """
        place = self.layout.places[name]
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        with disk_errors(Path(self.staged.root), self.layout.total_bytes):
            self._handle(place.file).write_at(view, place.offset + byte_start)
        self._hashes.setdefault(name, xxhash.xxh3_128()).update(view)
        self._spans.add(name, byte_start, byte_start + len(view))

    def finish(self, name: str) -> None:
        """Take note that a tensor has all its bytes.

        Raises
        ------
        ValueError
            If it has not: a mistake of the caller.
        """
        if missing := self._spans.first_gap(name, self.layout.places[name].nbytes):
            raise ValueError(f"{name!r}: bytes {missing[0]}:{missing[1]} were never written")
        self._hashes.setdefault(name, xxhash.xxh3_128())

    def digests(self) -> dict[str, str]:
        """Wait until all is on the disk; xxh3-128 of what was written, by tensor.

        Raises
        ------
        ResourceError, MergebenchError
            If it cannot be brought there.
        """
        with disk_errors(Path(self.staged.root), self.layout.total_bytes):
            for handle in self._handles.values():
                with handle.borrow() as fd:
                    flush(fd, data_only=True)
        return {name: str(state.hexdigest()) for name, state in self._hashes.items()}

    def _handle(self, file: str) -> Handle:
        if file in self._handles:
            return self._handles[file]
        name = file if file in self._inodes else ""
        # Tensors share pages. A network disk reads a page before it writes a part of it, if it
        # may, and then writes all of it: what others have put there meanwhile would be lost.
        handle = Handle(self.staged.path(name), PUT)
        if handle.stat().st_ino != self._inodes[name]:
            raise MergebenchError(
                f"{self.staged.root}: another run has begun to write this output",
                fix="wait for its end, or choose another name",
            )
        return self._handles.setdefault(file, handle)
