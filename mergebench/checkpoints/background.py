"""Work that nobody waits for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Background:
    """A few threads that end with the process, whatever they are at.

    Parameters
    ----------
    threads : int
        Started with the first work.
    name : str
        Of the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._count, self._name = threads, name
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._started = 0
        if hasattr(os, "register_at_fork"):
            # A child has none of the threads, and its work is not that of its parent.
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock, self._queue, self._started = threading.Lock(), SimpleQueue(), 0

    def run(self, work: Callable[[], object]) -> None:
        """Do something later; it must not raise."""
        with self._lock:
            self._queue.put(work)
            if self._started < self._count:
                self._started += 1
                # Daemons, so that Ctrl-C does not wait for a request on its way.
                threading.Thread(target=self._loop, name=self._name, daemon=True).start()

    def _loop(self) -> None:
        queue = self._queue
        while True:
            queue.get()()
