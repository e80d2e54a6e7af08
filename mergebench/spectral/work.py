"""Jobs of known size, as many at a time as memory and cores allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def within(
    work: Callable[[T], R], jobs: Sequence[tuple[T, int]], workers: int, budget: int
) -> Iterator[tuple[T, R]]:
    """``(job, result)`` in the order of the jobs.

    Parameters
    ----------
    work : callable
    jobs : sequence of (job, bytes)
        A job begins when its bytes and those of all that run are within the budget; one that is
        alone always begins.
    workers : int
        Threads.
    budget : int
        Bytes.
    """
    waiting = deque(enumerate(jobs))
    running: dict[Future[R], tuple[int, int]] = {}
    done: dict[int, R] = {}
    turn = held = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="mergebench") as pool:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    place, (job, size) = waiting[0]
                    if running and held + size > budget:
                        break
                    waiting.popleft()
                    running[pool.submit(work, job)] = place, size
                    held += size
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    place, size = running.pop(future)
                    held -= size
                    done[place] = future.result()
                while turn in done:
                    yield jobs[turn][0], done.pop(turn)
                    turn += 1
        finally:
            for future in running:
                future.cancel()
