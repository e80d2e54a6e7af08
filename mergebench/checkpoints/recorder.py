"""What has been done, brought to the disk in batches: the data first, then the journal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from typing import Any

from mergebench.checkpoints.journal import Journal

#: A batch is written once it is as old, or as large in bytes of tensors.
SECONDS, BYTES = 1.0, 1 << 30


class Recorder:
    """Fills a journal in batches, on a thread of its own, so that no merge waits for the disk.

    Any thread may call its methods.

    Parameters
    ----------
    journal : Journal
        Closed by :meth:`close`.
    sync : callable
        ``(file names) -> None``: waits until their data are on the disk.
    """

    def __init__(self, journal: Journal, sync: Callable[[Collection[str]], None]) -> None:
        self._journal, self._sync = journal, sync
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mergebench-journal")
        self._running: Future[None] | None = None
        self._lock = threading.RLock()
        self._finished: dict[str, str] = {}
        self._settled: dict[str, Any] = {}
        self._files: set[str] = set()
        self._bytes = 0
        self._since = monotonic()
        #: Whether any record is on the disk.
        self.recorded = False
        #: Whether a batch has failed; none is written after it, since a system that has once
        #: failed to write data may forget them and report success the next time.
        self.broken = False

    def finish(self, name: str, digest: str, file: str, nbytes: int) -> None:
        """Note a tensor all of whose bytes have been written.

        Raises
        ------
        OSError
            If an earlier batch could not be written.
        """
        with self._lock:
            self._finished[name] = digest
            self._files.add(file)
            self._bytes += nbytes
            self.poll()

    def settle(self, name: str, value: Any) -> None:
        """Note a JSON value.

        Raises
        ------
        OSError
            If an earlier batch could not be written.
        """
        with self._lock:
            self._settled[name] = value
            self.poll()

    def poll(self) -> None:
        """Begin to write what is old or large enough, unless a batch is still on its way.

        Raises
        ------
        OSError
            If an earlier batch could not be written.
        """
        with self._lock:
            if self._running is not None:
                if not self._running.done():
                    return
                self._wait()
            due = self._bytes >= BYTES or monotonic() - self._since >= SECONDS
            if due and (self._finished or self._settled):
                self._begin()

    def flush(self) -> None:
        """Write everything that is pending and wait for it.

        Raises
        ------
        OSError
            If this or an earlier batch could not be written.
        """
        with self._lock:
            self._wait()
            if self._finished or self._settled:
                self._begin()
                self._wait()

    def close(self) -> None:
        """Wait for the batch on its way, if any, and close the journal; never fails."""
        self._thread.shutdown()
        self._journal.close()

    def _begin(self) -> None:
        settled, finished, files = self._settled, self._finished, self._files
        self._settled, self._finished, self._files, self._bytes = {}, {}, set(), 0
        self._since = monotonic()

        def write() -> None:
            if files:
                self._sync(files)
            self._journal.append(settled, finished)
            self.recorded = True

        self._running = self._thread.submit(write)

    def _wait(self) -> None:
        running = self._running
        if running is None:
            return
        try:
            running.result()
        finally:
            # An interrupt may end the waiting and not the batch.
            if running.done():
                self._running = None
                self.broken = running.exception() is not None
