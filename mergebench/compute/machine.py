"""What the machine has: cores, and bytes of memory, in pages."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

#: Bytes that systems keep of a file, or hand to a disk, as one; or a multiple of it.
PAGE = 1 << 12


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def core_quota() -> float | None:
    """Cores that the control group of a container grants; ``None`` for no limit."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        given, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if given == "max" else int(given) / int(period)
    return None


def memory() -> int | None:
    """Bytes of memory; ``None`` where nobody can tell."""
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def free_memory() -> int | None:
    """Bytes that programs can still take without swapping; ``None`` where nobody can tell."""
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        if match := re.search(r"MemAvailable:\s+(\d+) kB", text):
            return int(match[1]) * 1024
    return None


def memory_limit() -> int | None:
    """Bytes that the control group of a container grants, files among them; ``None`` for all."""
    with suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return None if limit == "max" else int(limit)
    return None
