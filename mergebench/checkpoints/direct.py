"""Large pieces of an output handed straight to the disk, past the system's cache of files.

Bytes that go through the cache are copied into pages that the system must find and clear first,
and waited for at the end; a disk fetches those of whole pages where they are.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from mergebench.checkpoints.descriptors import WRITE, Handle
from mergebench.compute.machine import PAGE
from mergebench.core.tensor import address

#: An output from this size on is written so where nobody has said what the cache may hold.
LARGE = 1 << 28
#: Bytes of a piece for which it is worth a call.
_LEAST = 1 << 18
#: 0 where the system has no such way.
_FLAG: int = getattr(os, "O_DIRECT", 0)
_CANNOT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class Direct:
    """Writes to files that stand on a disk; through the cache wherever that cannot be.

    Safe under threads, as long as no two write to one page at the same time unless both go through
    the cache, which holds for pieces that do not overlap: only whole pages go past it.

    Attributes
    ----------
    works : bool
        Whether nothing has refused to be written so.
    """

    def __init__(self) -> None:
        self._handles: dict[Handle, Handle] = {}
        self.works = _FLAG != 0

    def open(self, path: Path, handle: Handle) -> None:
        """Make ready for a file; nothing happens where its file system cannot do it."""
        if not self.works:
            return
        try:
            os.close(os.open(path, WRITE | _FLAG))
        except OSError as error:
            # For anything else, such as too many open files, this one goes through the cache.
            self.works = error.errno not in _CANNOT
        else:
            self._handles[handle] = Handle(path, WRITE | _FLAG)

    def write(self, handle: Handle, view: memoryview, offset: int) -> None:
        """Write all bytes of a view at ``offset``.

        Raises
        ------
        OSError
            As the system gives it.
        """
        start = -offset % PAGE
        length = max((len(view) - start) // PAGE * PAGE, 0)
        straight = self._handles.get(handle) if self.works else None
        if (
            straight is None
            or length < _LEAST
            or (address(np.frombuffer(view, np.uint8)) + start) % PAGE
        ):
            handle.write_at(view, offset)
            return
        try:
            straight.write_at(view[start : start + length], offset + start)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            self.works = False
            handle.write_at(view, offset)
            return
        if start:
            handle.write_at(view[:start], offset)
        if start + length < len(view):
            handle.write_at(view[start + length :], offset + start + length)

    def close(self) -> None:
        """Close what :meth:`open` has made ready."""
        for straight in self._handles.values():
            straight.close()
        self._handles.clear()
