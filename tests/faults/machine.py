"""A machine that fails at a chosen moment: killed, cut off from power, interrupted, out of disk."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self
from unittest.mock import patch

from mergebench.checkpoints import descriptors, disk, recorder, replacing

#: How a machine fails: the process dies, with what it was writing torn; the power goes, so that
#: data that were not synced are lost; Ctrl-C; the disk is full from then on; one call fails.
Fault = Literal["kill", "power", "interrupt", "full", "broken"]
_GROWING = frozenset({"pwrite", "write", "side", "create", "fallocate", "truncate", "mkdir"})
_SYNCS = frozenset({"fsync", "fdatasync"})
_MOVES = frozenset({"rename", "delete"})
#: The calls at which each fault is tried. A sync changes nothing that a killed process leaves;
#: between two syncs a power cut loses the same data wherever it comes.
_TRIED = {
    "kill": _GROWING | _MOVES,
    "interrupt": _GROWING | _MOVES,
    "power": _SYNCS | _MOVES,
    "full": _GROWING,
    "broken": (_GROWING | _SYNCS) - {"mkdir"},
}


class KilledError(BaseException):
    """The process is dead: nothing it still tries to change has any effect."""


class _Inline(Executor):
    """Runs jobs where they are submitted, so that the n-th change is always the same one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class Machine:
    """Counts every change of the disk and fails at one of them.

    Parameters
    ----------
    fault : Fault
    at : int
        The change at which to fail, from 1; 0 never fails.
    reads : bool, default False
        Count reads of the inputs instead.
    exchange : bool, default True
        Whether the system can swap two folders in one step, if the real one can.
    """

    def __init__(
        self, fault: Fault = "kill", at: int = 0, *, reads: bool = False, exchange: bool = True
    ) -> None:
        self.fault, self.at, self.reads = fault, at, reads
        self.exchange = exchange
        self.count = 0
        self.failed = False
        #: ``(call, file name)`` of every change, or read, in order.
        self.calls: list[tuple[str, str]] = []
        self._unsynced: dict[int, list[tuple[int, int]]] = {}

    def _now(self, call: str, name: str, counted: bool) -> bool:
        """Whether the machine fails at this call."""
        if self.fault in ("kill", "power") and self.failed:
            raise KilledError
        if not counted:
            return False
        self.calls.append((call, name))
        if not self.reads and call not in _TRIED[self.fault]:
            return False
        self.count += 1
        if self.fault == "full":
            return 0 < self.at <= self.count
        return self.count == self.at

    def _fail(self) -> None:
        self.failed = True
        if self.fault == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.fault == "broken":
            raise OSError(errno.EIO, "Input/output error")
        raise KeyboardInterrupt if self.fault == "interrupt" else KilledError

    def _change(self, call: str, name: str, act: Callable[[], Any]) -> Any:
        if self._now(call, name, not self.reads):
            self._fail()
        return act()

    def pwrite(self, true: Callable[..., int], fd: int, data: Any, offset: int) -> int:
        torn = self._now("pwrite", _name(fd), not self.reads)
        part = memoryview(data)[: len(data) // 2] if torn else data
        self._wrote(fd, offset, len(part))
        count = true(fd, part, offset)
        if torn:
            self._fail()
        return count

    def _wrote(self, fd: int, start: int, length: int) -> None:
        self._unsynced.setdefault(os.fstat(fd).st_ino, []).append((start, start + length))

    def write(self, true: Callable[..., int], fd: int, data: Any) -> int:
        torn = self._now("write", _name(fd), not self.reads)
        count = true(fd, data[: len(data) // 2] if torn else data)
        if torn:
            self._fail()
        return count

    def preadv(
        self, true: Callable[..., int], fd: int, views: Any, offset: int, flags: int = 0
    ) -> int:
        if flags:
            raise BlockingIOError  # nothing is in memory, so that every read is a step
        if self._now("read", _name(fd), self.reads):
            self._fail()
        return true(fd, views, offset)

    def sync(self, call: str, fd: int) -> None:
        # What it would do to the real disk cannot be seen, and takes long.
        if self._now(call, _name(fd), not self.reads):
            self._fail()
        os.fstat(fd)
        self._unsynced.pop(os.fstat(fd).st_ino, None)

    def lose_unsynced(self, folder: Path) -> None:
        """What a power cut does to data that were not synced: zeros, the length as it was.

        The journal is spared: the worst order is that of a line which came to the disk before
        the data that it calls finished.
        """
        for path in folder.rglob("*"):
            for start, stop in self._unsynced.get(path.stat().st_ino, ()):
                with path.open("r+b") as file:
                    file.seek(start)
                    file.write(bytes(stop - start))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything inside the block happens on this machine, in one thread."""
        os_open, path_open, file_open = os.open, Path.open, io.open

        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if not flags & os.O_CREAT:
                return os_open(path, flags, *args, **kwargs)
            name = Path(path).name
            return self._change("create", name, lambda: os_open(path, flags, *args, **kwargs))

        def opened_side(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode != "wb":
                return path_open(path, mode, *args, **kwargs)
            return self._change("create", path.name, lambda: _File(self, path_open(path, mode)))

        def opened_head(fd: int, mode: str, *, closefd: bool) -> Any:
            return _File(self, file_open(fd, mode, closefd=closefd))

        def named(call: str, true: Callable[..., Any]) -> Callable[..., Any]:
            def act(first: Any, *args: Any, **kwargs: Any) -> Any:
                name = _name(first) if isinstance(first, int) else Path(first).name
                # Neither making what is there nor deleting what is not changes anything.
                if not kwargs and {"mkdir": True, "delete": False}.get(call) == _exists(first):
                    return true(first, *args)
                return self._change(call, name, lambda: true(first, *args, **kwargs))

            return act

        def wrapped(method: Callable[..., Any], *true: Any) -> Callable[..., Any]:
            return lambda *args: method(*true, *args)

        exchange = named("rename", replacing._exchange) if self.exchange else lambda *_: False
        simple = {
            "posix_fallocate": "fallocate", "ftruncate": "truncate", "mkdir": "mkdir",
            "rename": "rename", "replace": "rename", "unlink": "delete", "rmdir": "delete",
        }  # fmt: skip
        changes: list[Any] = [
            patch.object(os, name, named(call, getattr(os, name))) for name, call in simple.items()
        ]
        changes += [
            patch.object(os, "fsync", wrapped(self.sync, "fsync")),
            patch.object(os, "fdatasync", wrapped(self.sync, "fdatasync")),
            patch.object(os, "open", opened),
            patch.object(os, "write", wrapped(self.write, os.write)),
            patch.object(Path, "open", opened_side),
            patch.object(disk, "open", opened_head, create=True),
            patch.object(descriptors, "_PWRITE", wrapped(self.pwrite, os.pwrite)),
            patch.object(descriptors, "_PREADV", wrapped(self.preadv, os.preadv)),
            patch.object(replacing, "_exchange", exchange),
            patch.object(recorder, "ThreadPoolExecutor", _Inline),
            patch.object(recorder, "SECONDS", 0.0),
        ]
        for change in changes:
            change.start()
        try:
            yield
        finally:
            for change in reversed(changes):
                change.stop()


class _File:
    """An open file whose write is torn when the machine fails."""

    def __init__(self, machine: Machine, file: Any) -> None:
        self._machine, self._file = machine, file

    def write(self, data: bytes) -> int:
        fd = self._file.fileno()
        torn = self._machine._now("side", _name(fd), not self._machine.reads)
        self._machine._wrote(fd, self._file.tell(), len(data))
        count = self._file.write(data[: len(data) // 2] if torn else data)
        if torn:
            self._file.flush()
            self._machine._fail()
        return int(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _exists(path: Any) -> bool:
    return isinstance(path, (str, Path)) and os.path.lexists(path)


def _name(fd: int) -> str:
    """Of an open file, where the system tells."""
    try:
        return Path(f"/proc/self/fd/{fd}").readlink().name
    except OSError:
        return ""
