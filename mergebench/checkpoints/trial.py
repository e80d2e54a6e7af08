"""A folder tried out: how fast its disk is, and what it can do."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from mergebench.checkpoints.descriptors import READ, WRITE, Handle, cannot
from mergebench.checkpoints.disk import create, disk_errors, flush, free_bytes
from mergebench.checkpoints.locks import acquire
from mergebench.checkpoints.replacing import can_exchange
from mergebench.core.errors import MergebenchError

_BLOCK = 1 << 20
_PROBE = 1 << 20
#: Part of the free space that a trial takes at most.
_SHARE = 4


def try_disk(folder: Path, size: int = 256 << 20) -> dict[str, Any]:
    """Write, sync and read one file, and try what outputs rely on; nothing remains.

    Parameters
    ----------
    folder : Path
        Must exist.
    size : int, bytes, default 256 MiB
        Of the file; a quarter of the free space at most.

    Returns
    -------
    dict
        ``free`` bytes; ``bytes`` written; ``write`` (with the sync) and ``read`` in bytes per
        second; ``read_from_disk``: whether the system was asked to forget the file before it was
        read; ``file_system``; ``preallocation``, ``exchange`` and ``locks``: whether the folder
        has them.

    Raises
    ------
    MergebenchError
        If the folder is none or cannot be written to.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MergebenchError(f"{folder}: no such folder", fix="give a folder that exists")
    free = free_bytes(folder)
    if free is not None:
        size = min(size, free // _SHARE)
    size = max(size // _BLOCK, 1) * _BLOCK
    try:
        place = Path(tempfile.mkdtemp(prefix=".mergebench-doctor-", dir=folder))
    except OSError as error:
        raise cannot("written to", folder, error) from error
    try:
        with disk_errors(folder, size):
            speed = _speed(place / "file", size)
            return {
                "path": str(folder),
                "file_system": _file_system(folder),
                "free": free,
                **speed,
                "preallocation": _reserves(place / "reserved"),
                "exchange": can_exchange(place),
                "locks": _locks(place / "lock"),
            }
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _speed(path: Path, size: int) -> dict[str, Any]:
    # Random bytes: some disks compress, and some skip zeros.
    block = memoryview(np.random.default_rng(0).bytes(_BLOCK))
    create(path, size, b"")
    handle = Handle(path, WRITE)
    start = perf_counter()
    for offset in range(0, size, _BLOCK):
        handle.write_at(block, offset)
    with handle.borrow() as fd:
        flush(fd)
    written = perf_counter() - start
    handle.close()
    handle = Handle(path, READ)
    handle.advise(0, size, "dontneed")
    buffer = memoryview(bytearray(_BLOCK))
    start = perf_counter()
    for offset in range(0, size, _BLOCK):
        handle.read_at(buffer, offset)
    read = perf_counter() - start
    handle.close()
    return {
        "bytes": size,
        "write": size / max(written, 1e-9),
        "read": size / max(read, 1e-9),
        "read_from_disk": hasattr(os, "posix_fadvise"),
    }


def _reserves(path: Path) -> bool:
    create(path, _PROBE, b"")
    about = path.stat()
    return getattr(about, "st_blocks", 0) * 512 >= _PROBE


def _locks(path: Path) -> bool:
    lock = acquire(path, path)
    if lock is None:
        return False
    lock.release()
    return True


def _file_system(folder: Path) -> str:
    """Name of the file system; empty where the system does not tell."""
    found, longest = "", -1
    real = folder.resolve()
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
            _, point, kind, *_ = line.split(" ")
            # Blanks are written as octal numbers there.
            place = Path(point.encode().decode("unicode_escape"))
            if real.is_relative_to(place) and len(place.parts) >= longest:
                found, longest = kind, len(place.parts)
    return found
