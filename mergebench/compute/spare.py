"""Room that jobs use one after the other."""

from __future__ import annotations

import mmap
from collections import deque

import numpy as np
from numpy.typing import NDArray


class Spare:
    """Blocks of memory that are used again.

    The system clears every page that it gives out: where each job asks for room of its own, that
    takes a third of a linear merge. There are never more blocks than were held at one time, and of
    one that is larger than what is asked for, the rest is never touched.

    Parameters
    ----------
    size : int
        Bytes of a block; what is larger is not kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: deque[NDArray[np.uint8]] = deque()

    def take(self, size: int) -> NDArray[np.uint8]:
        """At least so many bytes from a page's beginning on, anything in them; any thread."""
        if size > self.size:
            return _block(size)
        try:
            return self._free.pop()
        except IndexError:
            return _block(self.size)

    def give(self, block: NDArray[np.uint8]) -> None:
        """Give back what :meth:`take` gave, when nothing looks at it any more; any thread."""
        if block.size == self.size:
            self._free.append(block)


def _block(size: int) -> NDArray[np.uint8]:
    # From the system itself: it begins with a page, and nothing of it is left when it is let go of,
    # of which allocators keep megabytes.
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    return np.frombuffer(mmap.mmap(-1, max(size, 1), **private), np.uint8)[:size]
