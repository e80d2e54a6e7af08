"""Space on a disk: asked for, reserved, and exhausted; and what is certain to lie on it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergebench.checkpoints.descriptors import cannot
from mergebench.core.errors import ResourceError

if sys.platform == "darwin":
    import fcntl

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


def holds(path: Path, size: int, head: bytes, late: tuple[int, int] = (0, 0)) -> bool:
    """Whether a regular file of this size, and no link, is there and starts with ``head``.

    The bytes from ``late[0]`` to ``late[1]`` may be any.
    """
    start, stop = late
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size != size:
            return False
        with path.open("rb") as file:
            found = file.read(len(head))
            return found[:start] == head[:start] and found[stop:] == head[stop:]
    except OSError:
        return False


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


def flush(fd: int, *, data_only: bool = False) -> None:
    """Wait until what was written to an open file is on the disk, and not in a cache of it.

    Parameters
    ----------
    fd : int
    data_only : bool, default False
        Leave out what reading the data does not need, such as the modification time.

    Raises
    ------
    OSError
        The data may then be lost even if a second try succeeds.
    """
    if sys.platform == "darwin":
        # There fsync only hands the data to the drive, which may write them in any order.
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY):
                raise
        else:
            return
    if data_only and hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    # Windows cannot open a folder, and some network disks cannot sync one.
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            flush(fd)
        finally:
            os.close(fd)


def sync_tree(folder: Path) -> None:
    """Wait until the names in a folder and in those below are on the disk."""
    if folder.is_dir():
        for below, _, _ in os.walk(folder):
            sync_folder(Path(below))


def remove(path: Path) -> None:
    """Delete a file or a folder as far as the system lets us; a link is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


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


def check_space(destination: Path, needed: int, taken: int = 0) -> None:
    """Refuse an output that the disk cannot hold.

    Parameters
    ----------
    destination : Path
    needed : int
        Bytes of the output.
    taken : int, default 0
        Bytes of it that the disk has already given.

    Raises
    ------
    ResourceError
        If fewer bytes than it still needs are free there.
    """
    free = free_bytes(destination)
    if free is not None and free < needed - taken:
        raise full(destination, needed)


def taken_bytes(place: Path) -> int:
    """Bytes that a file, or the files below a folder, have been given on the disk."""
    files = [below for below in place.rglob("*") if below.is_file()] if place.is_dir() else [place]
    taken = 0
    for file in files:
        with suppress(OSError):
            about = file.stat()
            taken += min(about.st_size, getattr(about, "st_blocks", about.st_size) * 512)
    return taken


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
