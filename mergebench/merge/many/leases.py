"""Which of the workers of a merge are alive.

Every worker rewrites a small file of its own every few seconds. Others do not compare clocks: they
watch whether that file changes. Beside it the worker holds a lock, which the system drops when it
dies. On one machine the lock says at once who is alive. Between machines it is not asked: over
network disks some locks never reach the server and others outlive the machine that held them. What
comes of a wrong answer is only that a unit is done twice, with the same bytes.
"""

from __future__ import annotations

import json
import os
import platform
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal, Self

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.disk import flush
from mergebench.checkpoints.locks import Lock, TakenError, acquire
from mergebench.core.errors import MergebenchError

#: Seconds between two beats, and without any after which a worker counts as dead.
BEAT, LEASE = 2.0, 30.0
#: A record has this many bytes, so that a new one covers the old one.
_LENGTH = 512
#: Looks at a lock are over in no time; seconds for which one is not yet taken for a holder.
_GLANCE = 1.0

State = Literal["absent", "alive", "dead"]


def beat_of(folder: Path, number: int) -> Path:
    """The file of one worker."""
    return folder / f"worker-{number}"


def came(folder: Path, count: int) -> bool:
    """Whether all of so many workers have started, and maybe ended."""
    return all(beat_of(folder, number).exists() for number in range(count))


def _lock_of(beat: Path) -> Path:
    return beat.with_name(beat.name + ".lock")


def read_beat(beat: Path) -> dict[str, Any] | None:
    """What a worker says of itself: ``of``, ``host``, ``process`` and ``beat``; ``None`` if not."""
    try:
        found = json.loads(beat.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(eq=False)
class Watch:
    """Tells who is alive.

    Attributes
    ----------
    lease : float
        Seconds without a beat after which a worker on another machine counts as dead.
    """

    lease: float = LEASE
    _seen: dict[Path, tuple[Any, float]] = field(default_factory=dict)

    def state(self, beat: Path) -> State:
        """Of the worker of a file; one that is seen for the first time is given its lease."""
        about = read_beat(beat)
        if about is None and not beat.exists():
            return "absent"
        if about is not None and about.get("host") == platform.node():
            held = _is_held(_lock_of(beat))
            if held is not None:
                return "alive" if held else "dead"
        now = monotonic()
        before, since = self._seen.get(beat, (None, now))
        if before != about:
            before, since = about, now
        self._seen[beat] = before, since
        return "alive" if now - since < self.lease else "dead"


def _is_held(path: Path) -> bool | None:
    """Whether somebody has a lock; ``None`` where that cannot be known."""
    try:
        lock = acquire(path, path, shared=True)
    except TakenError:
        return True
    except MergebenchError:
        return None
    if lock is None:
        return None
    lock.release()
    return False


class Lease:
    """Says that this process is worker ``number`` of ``count``, as long as it is held.

    Raises on entry a :class:`MergebenchError` if another process is that worker, or if workers of
    another number are at work.
    """

    def __init__(self, folder: Path, number: int, count: int, watch: Watch) -> None:
        self._folder, self._number, self._count = folder, number, count
        self._beat, self._watch = beat_of(folder, number), watch
        self._lock: Lock | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mergebench-lease", daemon=True)
        self._beats = 0

    def __enter__(self) -> Self:
        self._lock = self._acquire()
        try:
            self._refuse_others()
            self._write()
        except BaseException:
            self._release()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._release()

    def _acquire(self) -> Lock | None:
        since = monotonic()
        while True:
            try:
                return acquire(_lock_of(self._beat), self._beat)
            except TakenError as error:
                if monotonic() - since > _GLANCE:
                    raise self._taken() from error
                sleep(0.05)

    def _refuse_others(self) -> None:
        about = read_beat(self._beat)
        # On this machine the lock has told; elsewhere only waiting tells.
        if about is not None and about.get("host") != platform.node():
            first = about.get("beat")
            while self._watch.state(self._beat) == "alive":
                if (read_beat(self._beat) or {}).get("beat") != first:
                    raise self._taken()
                sleep(min(BEAT, self._watch.lease) / 4)
        for path in sorted(self._folder.glob("worker-*")):
            about = read_beat(path) if path != self._beat and not path.suffix else None
            if about is None or about.get("of") == self._count:
                continue
            if self._watch.state(path) == "alive":
                raise MergebenchError(
                    f"--worker {self._number}/{self._count}: others of this merge are at work",
                    got=f"worker {path.name.removeprefix('worker-')}/{about.get('of')}",
                    fix="give all of them the same number, or wait for their end",
                )
            # Nobody takes its place among so many.
            with suppress(OSError):
                path.unlink()

    def _taken(self) -> MergebenchError:
        about = read_beat(self._beat) or {}
        return MergebenchError(
            f"--worker {self._number}/{self._count}: that worker is at work already",
            got=f"process {about.get('process', '?')} on {about.get('host', 'some machine')}",
            fix="start each worker once, or wait for its end",
        )

    def _run(self) -> None:
        while not self._stop.wait(BEAT):
            # A disk that is away for a moment costs a beat; the work itself will tell.
            with suppress(OSError, MergebenchError):
                self._write()

    def _write(self) -> None:
        self._beats += 1
        about = {
            "of": self._count,
            "host": platform.node(),
            "process": os.getpid(),
            "beat": self._beats,
        }
        record = json.dumps(about).encode().ljust(_LENGTH - 1) + b"\n"
        try:
            with self._beat.open("r+b" if self._beat.exists() else "w+b") as file:
                file.write(record)
                file.flush()
                flush(file.fileno())
        except OSError as error:
            raise cannot("written", self._beat, error) from error

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()
