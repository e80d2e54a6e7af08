"""Files read and written at positions, through a bounded number of open descriptors.

A model may have hundreds of shards and a process only 256 descriptors, so descriptors are opened
when first needed and the idle ones are closed, least recently used first.
"""

from __future__ import annotations

import errno
import io
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from mergebench.compute.machine import PAGE
from mergebench.core.errors import FormatError, MergebenchError

#: Idle descriptors kept open, over all files of the process.
CAPACITY = 64
READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
WRITE = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
PUT = os.O_WRONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
# One system call moves at most this many bytes: Linux stops below 2 GiB, macOS refuses above.
_CALL = 1 << 30
_PREADV: Any = getattr(os, "preadv", None)
_PWRITE: Any = getattr(os, "pwrite", None)
#: Read only what is there without waiting for a disk.
_CACHED: int = getattr(os, "RWF_NOWAIT", 0)
_ADVICE: Mapping[str, int | None] = {
    name: getattr(os, "POSIX_FADV_" + name.upper(), None)
    for name in ("normal", "random", "willneed", "dontneed")
}
#: Seconds per place beyond which a disk seeks, so that what it gave is better kept.
_SEEK = 1e-3


class _Slot:
    """What the pool knows about one file; outlives the handle until its descriptor is closed."""

    __slots__ = ("fd", "flags", "path", "seek", "seen", "users")

    def __init__(self, path: str, flags: int) -> None:
        self.path, self.flags = path, flags
        self.fd: int | None = None
        self.users = 0
        self.seen: tuple[int, int] | None = None
        self.seek = threading.Lock()


class _Pool:
    """Open descriptors, least recently used first; those in use are never closed."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Slot] = OrderedDict()
        self._retired: deque[_Slot] = deque()

    def renew_lock(self) -> None:
        """Start with a free lock in a forked child, whatever its parent's threads were doing."""
        self._lock = threading.Lock()

    def open_count(self) -> int:
        """Descriptors open now."""
        return len(self._open)

    def acquire(self, slot: _Slot) -> int:
        with self._lock:
            self._drain()
            if slot.fd is None:
                slot.fd = self._open_slot(slot)
                self._open[id(slot)] = slot
            slot.users += 1
            self._open.move_to_end(id(slot))
            self._shrink(self.capacity)
            return slot.fd

    def release(self, slot: _Slot) -> None:
        with self._lock:
            slot.users -= 1
            self._drain()
            self._shrink(self.capacity)

    def retire(self, slot: _Slot) -> None:
        """Close the descriptor of a file that nobody holds any more.

        Garbage collection may call this at any line, also inside the locked ones above, so the
        slot is queued and whoever holds the lock next closes it.
        """
        self._retired.append(slot)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def _drain(self) -> None:
        while self._retired:
            self._close(self._retired.popleft())

    def _shrink(self, capacity: int) -> None:
        surplus = len(self._open) - capacity
        if surplus > 0:
            idle = [slot for slot in self._open.values() if slot.users == 0]
            for slot in idle[:surplus]:
                self._close(slot)

    def _close(self, slot: _Slot) -> None:
        fd, slot.fd = slot.fd, None
        self._open.pop(id(slot), None)
        if fd is not None:
            os.close(fd)

    def _open_slot(self, slot: _Slot) -> int:
        try:
            fd = os.open(slot.path, slot.flags)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise cannot("opened", slot.path, error) from error
            self._shrink(0)
            try:
                fd = os.open(slot.path, slot.flags)
            except OSError as again:
                raise cannot("opened", slot.path, again) from again
        if slot.flags == READ:
            now = os.fstat(fd)
            seen = now.st_size, now.st_mtime_ns
            if slot.seen not in (None, seen):
                os.close(fd)
                raise FormatError(
                    f"{slot.path}: changed while it was in use",
                    expected="the size and modification time seen first",
                    fix="start again, and leave the inputs alone while a command runs",
                )
            slot.seen = seen
        return fd


_POOL = _Pool(CAPACITY)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.renew_lock)


def cannot(verb: str, path: str | Path, error: OSError) -> MergebenchError:
    """The error for a file that the system does not let us open, read or write."""
    return MergebenchError(
        f"{path}: cannot be {verb}",
        got=error.strerror or str(error),
        fix="check the path, its permissions and the disk",
    )


def _advise(fd: int, offset: int, length: int, advice: str) -> None:
    flag = _ADVICE[advice]
    if flag is not None:
        with suppress(OSError):
            os.posix_fadvise(fd, offset, length, flag)


class Handle:
    """One file, opened when first needed and closed when collected; safe under threads.

    Parameters
    ----------
    path : Path
        Kept absolute, so that a later change of the working directory does not matter.
    flags : int, default READ
        ``READ``, ``WRITE`` or, of a file that others write at the same time, ``PUT``. A file
        opened for reading must keep its size and modification time.
    """

    far = False

    def __init__(self, path: Path, flags: int = READ) -> None:
        self.path = path
        self._slot = _Slot(str(path.absolute()), flags)
        weakref.finalize(self, _POOL.retire, self._slot).atexit = False

    @contextmanager
    def borrow(self) -> Iterator[int]:
        """The descriptor, which stays open inside the block."""
        fd = _POOL.acquire(self._slot)
        try:
            yield fd
        finally:
            _POOL.release(self._slot)

    def close(self) -> None:
        """Close the descriptor; the handle may be used again. Not while others use it."""
        _POOL.retire(self._slot)

    def stat(self) -> os.stat_result:
        """Size, times and mode of the open file."""
        with self.borrow() as fd:
            return os.fstat(fd)

    def read_at(self, view: memoryview, offset: int) -> int:
        """Fill a byte view from ``offset`` on; the bytes read, fewer only at the end of the file.

        Raises
        ------
        MergebenchError
            If the system refuses.
        """
        if not len(view):
            return 0
        # Small reads are many: a context would take as long as the read.
        fd = _POOL.acquire(self._slot)
        try:
            return self._fill(fd, view, offset)
        finally:
            _POOL.release(self._slot)

    def read_runs(self, view: memoryview, runs: Iterable[tuple[int, int]]) -> int:
        """Fill a byte view from short runs ``(offset, length)``, one behind the other.

        Where the system can tell, they leave nothing in its cache that was not there: single pages,
        between which Linux would bring in one page at a time what is read around them later, at
        twice the cost. What a disk has to seek stays, for whoever looks again.

        Returns
        -------
        int
            The bytes read; fewer than asked for only if a run goes beyond the end of the file.

        Raises
        ------
        MergebenchError
            If the system refuses.
        """
        done = 0
        if not len(view):
            return done
        absent: list[tuple[int, int]] = []
        fd = _POOL.acquire(self._slot)
        try:
            # Linux would go on reading behind two runs that happen to lie close together.
            _advise(fd, 0, 0, "random")
            began = perf_counter()
            for start, length in runs:
                got = self._look(fd, view[done : done + length], start, absent)
                done += got
                if got < length:
                    break
            if perf_counter() - began < _SEEK * len(absent):
                for first, stop in absent:
                    _advise(fd, first, stop - first, "dontneed")
        finally:
            _advise(fd, 0, 0, "normal")
            _POOL.release(self._slot)
        return done

    def _fill(self, fd: int, view: memoryview, offset: int) -> int:
        done = 0
        try:
            while done < len(view):
                count = self._read(fd, view[done : done + _CALL], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise cannot(f"read at byte {offset + done}", self.path, error) from error
        return done

    def _look(self, fd: int, view: memoryview, offset: int, absent: list[tuple[int, int]]) -> int:
        """Read a run; the pages of it that were not there are added to a list."""
        there = None
        if _PREADV is not None and _CACHED and len(view):
            try:
                there = int(_PREADV(fd, [view], offset, _CACHED))
            except BlockingIOError:
                there = 0
            except OSError:
                pass  # a file system that cannot tell
            if there == len(view):
                return there
        got = self._fill(fd, view, offset)
        if there is not None:
            first, stop = offset + there, offset + got
            absent.append((first - first % PAGE, stop + -stop % PAGE))
        return got

    def _read(self, fd: int, view: memoryview, offset: int) -> int:
        if _PREADV is not None:
            return int(_PREADV(fd, [view], offset))
        with self._slot.seek:
            os.lseek(fd, offset, os.SEEK_SET)
            return io.FileIO(fd, closefd=False).readinto(view) or 0

    def write_at(self, view: memoryview, offset: int) -> None:
        """Write all bytes of a view at ``offset``.

        Raises
        ------
        OSError
            As the system gives it: the caller knows what a full disk means.
        """
        done = 0
        with self.borrow() as fd:
            while done < len(view):
                done += self._write(fd, view[done : done + _CALL], offset + done)

    def _write(self, fd: int, view: memoryview, offset: int) -> int:
        if _PWRITE is not None:
            return int(_PWRITE(fd, view, offset))
        with self._slot.seek:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, view)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        with self.borrow() as fd:
            os.fsync(fd)

    def advise(self, offset: int, length: int, advice: str) -> None:
        """Tell the system that a byte range will be needed soon, or not any more.

        Parameters
        ----------
        offset, length : int
            Bytes.
        advice : str
            ``"willneed"`` or ``"dontneed"``. Nothing happens where the system takes no advice.
        """
        if length > 0:
            with self.borrow() as fd:
                _advise(fd, offset, length, advice)
