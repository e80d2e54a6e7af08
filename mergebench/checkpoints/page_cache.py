"""The system's cache of files: how much of it a run may fill, and writing without filling it."""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from pathlib import Path

from mergebench.checkpoints.descriptors import Handle
from mergebench.checkpoints.sizes import parse_size
from mergebench.core.errors import MergebenchError, ParameterError

#: A run that reads and writes more than this lets go of what it is done with: a size, or auto,
#: which is half of the memory that is available.
VARIABLE = "MERGEBENCH_PAGE_CACHE"
#: Written bytes of a file that may stand in the cache before they are let go.
STEP = 1 << 23
_SHARE = 2


def limit() -> int | None:
    """Bytes of files that a run may leave in the cache; ``None`` where nobody can tell.

    Raises
    ------
    ParameterError
        If the environment asks for something else than a size.
    """
    asked = os.environ.get(VARIABLE, "auto") or "auto"
    if asked != "auto":
        try:
            return parse_size(asked)
        except MergebenchError as error:
            raise ParameterError(VARIABLE, got=repr(asked), expected="auto or a size") from error
    found = available()
    return None if found is None else found // _SHARE


def available() -> int | None:
    """Bytes of memory that programs and files can still take; ``None`` where nobody can tell."""
    found = []
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        if match := re.search(r"MemAvailable:\s+(\d+) kB", text):
            found.append(int(match[1]) * 1024)
    with suppress(OSError, ValueError):
        # Files count among the memory of a container.
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(found, default=None)


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
