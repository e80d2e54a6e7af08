"""Space on a disk: asked for, reserved, and exhausted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergebench.checkpoints.descriptors import cannot
from mergebench.core.errors import ResourceError

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def create(path: Path, size: int, head: bytes) -> None:
    """Make a new file of ``size`` bytes that starts with ``head``; its mode honours the umask.

    The space is reserved where the system can, so that a full disk shows here.

    Raises
    ------
    OSError
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
    fd = os.open(path, flags, 0o666)
    try:
        _reserve(fd, size)
        with open(fd, "r+b", closefd=False) as file:
            file.write(head)
    finally:
        os.close(fd)


def _reserve(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        else:
            return
    os.ftruncate(fd, size)


@contextmanager
def disk_errors(destination: Path, needed: int) -> Iterator[None]:
    """Turn the system's errors while writing into ours.

    Parameters
    ----------
    destination : Path
        Named in messages.
    needed : int
        Bytes of the whole output.

    Raises
    ------
    ResourceError
        Where the disk or the quota is full.
    MergebenchError
        For any other error of the system.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise full(destination, needed) from error
        raise cannot("written", destination, error) from error


def check_space(destination: Path, needed: int) -> None:
    """Refuse an output that the disk cannot hold.

    Raises
    ------
    ResourceError
        If fewer than ``needed`` bytes are free there.
    """
    free = free_bytes(destination)
    if free is not None and free < needed:
        raise full(destination, needed)


def free_bytes(destination: Path) -> int | None:
    """Bytes free on the disk of a path that need not exist; ``None`` where unknown."""
    for folder in (destination, *destination.absolute().parents):
        if folder.is_dir():
            try:
                usage = shutil.disk_usage(folder)
            except OSError:
                return None
            # Some network disks answer zero to everything.
            return usage.free if usage.total else None
    return None


def full(destination: Path, needed: int) -> ResourceError:
    """The error for a disk that is too small."""
    free = free_bytes(destination)
    return ResourceError(
        f"{destination}: not enough space on the disk",
        expected=f"{needed} bytes",
        got="a full disk or quota" if free is None or free >= needed else f"{free} bytes free",
        fix="free some space, or write to another disk",
    )
