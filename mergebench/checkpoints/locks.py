"""A lock that one process holds on one output, and that the system takes back when it dies."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

from mergebench.checkpoints.descriptors import WRITE, cannot
from mergebench.core.errors import MergebenchError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_FLAGS = WRITE | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
# Windows locks bytes and lets nobody else read them, so the byte lies beyond the process id.
_BYTE = 1 << 30


class TakenError(MergebenchError):
    """Another process holds the lock."""


class Lock:
    """The lock of one output, held until :meth:`release` or the end of the process.

    It is on a hidden file, which goes when the lock is released: who waits for it finds that its
    name leads to another file, or to none, and asks again.
    """

    def __init__(self, path: Path, fd: int, *, shared: bool = False) -> None:
        self._path, self._fd, self._shared = path, fd, shared

    def release(self) -> None:
        """Take the file away and let the next one in; nothing happens the second time."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            # A name that leads elsewhere is the lock of another run, which has been quick.
            if sys.platform != "win32" and not self._shared and _leads_to(self._path, fd):
                with suppress(OSError):
                    self._path.unlink()
        finally:
            os.close(fd)
        if sys.platform == "win32":
            # An open file cannot be taken away there, so nobody else has it if this succeeds.
            with suppress(OSError):
                self._path.unlink()


def acquire(path: Path, destination: Path, *, shared: bool = False) -> Lock | None:
    """Lock an output for this process.

    Parameters
    ----------
    path : Path
        The hidden file, made if missing; what a dead process has left of it does not matter.
    destination : Path
        The output, named in messages.
    shared : bool, default False
        Hold it together with others who do so; the file then stays when it is released. Nobody
        can on Windows.

    Returns
    -------
    Lock or None
        ``None`` where the disk knows no locks, as some network disks do.

    Raises
    ------
    TakenError
        If another run holds the lock, naming its process.
    MergebenchError
        If the system refuses the file.
    """
    if shared and sys.platform == "win32":
        return None
    while True:
        try:
            fd = os.open(path, _FLAGS, 0o666)
        except OSError as error:
            raise cannot("made", path, error) from error
        kept = locked = False
        try:
            if not (locked := _lock(fd, shared)):
                raise _taken(destination, fd)
            if _leads_to(path, fd):
                # Only for the message above, so a full disk does not matter.
                with suppress(OSError):
                    os.ftruncate(fd, 0)
                    os.lseek(fd, 0, os.SEEK_SET)
                    os.write(fd, str(os.getpid()).encode())
                kept = True
                return Lock(path, fd, shared=shared)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise cannot("locked", path, error) from error
            if shared:
                return None
            with suppress(OSError):
                path.unlink()
            return None
        finally:
            if not kept:
                try:
                    # After an interrupt a name that is ours must not stay.
                    if locked and not shared and _leads_to(path, fd):
                        with suppress(OSError):
                            path.unlink()
                finally:
                    os.close(fd)


def _lock(fd: int, shared: bool = False) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(fd, _BYTE, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True


def _leads_to(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except OSError:
        return False


def _taken(destination: Path, fd: int) -> TakenError:
    os.lseek(fd, 0, os.SEEK_SET)
    text = os.read(fd, 20)
    who = f"process {text.decode()}" if text.isdigit() else "a process that has just started"
    return TakenError(
        f"{destination}: is being written by another run",
        got=who,
        fix="wait for its end, or choose another name",
    )
