"""The system's cache of files: how much of it a run may fill, and writing without filling it."""

from __future__ import annotations

import os
import threading

from mergebench.checkpoints.descriptors import Handle
from mergebench.checkpoints.sizes import parse_size
from mergebench.compute.machine import free_memory, memory_limit
from mergebench.core.errors import MergebenchError, ParameterError

#: A run that reads and writes more than this lets go of what it is done with: a size, or auto,
#: which is half of the memory that is available.
VARIABLE = "MERGEBENCH_PAGE_CACHE"
#: Written bytes of a file that may stand in the cache before they are let go.
STEP = 1 << 23
_SHARE = 2
#: Bytes for which there is room everywhere: to ask takes longer than to merge them.
LITTLE = 1 << 24


def asked() -> bool:
    """Whether the environment says how much a run may leave."""
    return (os.environ.get(VARIABLE, "auto") or "auto") != "auto"


def limit() -> int | None:
    """Bytes of files that a run may leave in the cache; ``None`` where nobody can tell.

    Raises
    ------
    ParameterError
        If the environment asks for something else than a size.
    """
    if asked():
        size = os.environ[VARIABLE]
        try:
            return parse_size(size)
        except MergebenchError as error:
            raise ParameterError(VARIABLE, got=repr(size), expected="auto or a size") from error
    found = available()
    return None if found is None else found // _SHARE


def available() -> int | None:
    """Bytes of memory that programs and files can still take; ``None`` where nobody can tell."""
    # Files count among the memory of a container.
    found = (free_memory(), memory_limit())
    return min((each for each in found if each is not None), default=None)


class Behind:
    """Lets go of what is written while more is; safe under threads.

    Pages that are not on the disk yet cannot be let go, but are sent on their way by being told
    so: what was written two steps ago has left with the step before. The system itself slows
    writers that are faster than their disk.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[Handle, int] = {}

    def wrote(self, handle: Handle, length: int) -> None:
        """Take note of bytes that were written."""
        with self._lock:
            since = self._since.get(handle, 0) + length
            self._since[handle] = 0 if since >= STEP else since
        if since >= STEP:
            self.drop(handle)

    def drop(self, handle: Handle) -> None:
        """Let go of all of a file that is on the disk."""
        handle.advise(0, handle.stat().st_size, "dontneed")
