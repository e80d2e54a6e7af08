"""The files of an output while tiles are written to them: how bytes go there, and stay."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mergebench.checkpoints.descriptors import WRITE, Handle
from mergebench.checkpoints.direct import Direct
from mergebench.checkpoints.disk import flush
from mergebench.checkpoints.page_cache import Behind


class OpenFiles:
    """Files by their names in an output; writing is safe under threads. Errors are the system's.

    Parameters
    ----------
    lean : bool
        Do not leave what is written in the page cache.
    direct : bool
        Write past the page cache where the file system can.
    """

    def __init__(self, *, lean: bool, direct: bool) -> None:
        self._behind = Behind() if lean else None
        self._direct = Direct() if direct else None
        self._handles: dict[str, Handle] = {}

    @property
    def waits(self) -> bool:
        """Whether writing waits for a disk."""
        return self._direct is not None and self._direct.works

    def open(self, name: str, path: Path) -> None:
        """Make ready for a file that exists."""
        self._handles[name] = handle = Handle(path, WRITE)
        if self._direct is not None:
            self._direct.open(path, handle)

    def write(self, name: str, view: memoryview, offset: int) -> None:
        """Write all bytes of a view, of tensors."""
        handle = self._handles[name]
        if self._direct is None:
            handle.write_at(view, offset)
        else:
            self._direct.write(handle, view, offset)
        # File systems may take what is to go past the cache, and keep it there all the same.
        if self._behind is not None:
            self._behind.wrote(handle, len(view))

    def fill(self, name: str, data: bytes, offset: int) -> None:
        """Write bytes that a header has left open."""
        self._handles[name].write_at(memoryview(data), offset)

    def renew(self, name: str) -> None:
        """Open a file anew: a network disk then sees what others have written to it."""
        self._handles[name].close()

    def sync(self, names: Iterable[str]) -> None:
        """Bring the data of some files to the disk."""
        for name in sorted(names):
            with self._handles[name].borrow() as fd:
                flush(fd, data_only=True)

    def seal(self) -> None:
        """Bring everything to the disk."""
        for handle in self._handles.values():
            with handle.borrow() as fd:
                flush(fd)
            if self._behind is not None:
                self._behind.drop(handle)

    def close(self) -> None:
        """Let go of all files."""
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()
        if self._direct is not None:
            self._direct.close()
