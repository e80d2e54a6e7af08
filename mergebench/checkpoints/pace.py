"""Which files are worth asking for ahead, measured: those of slow disks.

What a program asks Linux for comes into the page cache one page of 4 KiB at a time, but in pieces
of up to 2 MiB where the system reads ahead by itself (ext4 on 6.18): 0.27 and 0.12 CPU seconds per
GB. On a fast disk asking makes a merge slower, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from time import perf_counter

from mergebench.checkpoints.descriptors import Handle
from mergebench.compute.machine import PAGE
from mergebench.core.extents import Store

#: Bytes read per place to see how fast a disk is, and places, as shares of a file.
PIECE, PLACES = 1 << 22, (0.3, 0.55, 0.8)
#: Bytes per second from which on nothing is asked for. Below, merges wait for the disk anyway.
ENOUGH = 250e6


def to_ask(stores: Iterable[Store]) -> set[Store]:
    """Those of the stores that are asked for ahead.

    All that come over a network, and the files of every disk whose largest file here is read more
    slowly than :data:`ENOUGH`: 12 MiB of it are read.

    Raises
    ------
    MergebenchError
        If one cannot be read.
    """
    found: set[Store] = set()
    disks: dict[int, list[tuple[int, Handle]]] = {}
    for store in dict.fromkeys(stores):
        if store.far:
            found.add(store)
        elif isinstance(store, Handle) and hasattr(os, "posix_fadvise"):
            seen = store.stat()
            disks.setdefault(seen.st_dev, []).append((seen.st_size, store))
    for files in disks.values():
        size, largest = max(files, key=lambda each: each[0])
        if pace_of(largest, size) < ENOUGH:
            found.update(handle for _, handle in files)
    return found


def pace_of(handle: Handle, size: int) -> float:
    """Bytes per second of the slowest place: the others may lie in the system's cache."""
    room = memoryview(bytearray(min(PIECE, size)))
    slowest = float("inf")
    for share in PLACES:
        start = int((size - len(room)) * share) // PAGE * PAGE
        began = perf_counter()
        got = handle.read_at(room, start)
        if got:
            slowest = min(slowest, got / max(perf_counter() - began, 1e-9))
        handle.advise(start, got, "dontneed")
    return slowest
