"""Train what is not cached, then merge and evaluate, two processes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch

from .evaluate import Score, score_base, score_experts, score_merge, score_single
from .experts import Expert, bases, experts, make, ranks_with_full
from .merges import merges
from .settings import Settings

PROCESSES = 2

# Called with the number of finished jobs and of all jobs.
Progress = Callable[[int, int], None]


@contextmanager
def workers(processes: int = PROCESSES) -> Iterator[ProcessPoolExecutor]:
    """Start a pool of fresh processes with one torch thread each."""
    pool = ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def train_all(pool: ProcessPoolExecutor, settings: Settings, work: Path, progress: Progress) -> int:
    """Make every model that is missing under ``work`` and return how many were trained.

    The experts of a seed start as soon as its base is there, so no process waits.
    """
    waiting = {seed: [e for e in experts(settings) if e.seed == seed] for seed in settings.seeds}
    total = len(settings.seeds) + sum(map(len, waiting.values()))

    def submit(expert: Expert) -> Future[bool]:
        if expert.folder(settings, work).exists():
            # No process is started where there is nothing to train.
            known: Future[bool] = Future()
            known.set_result(False)
            return known
        return pool.submit(make, expert, settings, work)

    pending = {submit(base): base for base in bases(settings)}
    finished = trained = 0
    while pending:
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            expert = pending.pop(future)
            trained += future.result()
            finished += 1
            if expert.domain is None:
                pending |= {submit(each): each for each in waiting[expert.seed]}
        progress(finished, total)
    return trained


def score_all(
    pool: ProcessPoolExecutor, settings: Settings, work: Path, progress: Progress
) -> dict[int, list[Score]]:
    """Merge and evaluate everything; return the rows of the table, in order, per seed."""
    planned: dict[int, list[Future[Score]]] = {}
    for seed in settings.seeds:
        planned[seed] = [
            pool.submit(score_base, settings, work, seed),
            *(
                pool.submit(score_experts, settings, work, seed, rank)
                for rank in ranks_with_full(settings)
            ),
            pool.submit(score_single, settings, work, seed),
            *(pool.submit(score_merge, settings, work, seed, merge) for merge in merges(settings)),
        ]
    pending = {future for futures in planned.values() for future in futures}
    total = len(pending)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        progress(total - len(pending), total)
    return {seed: [future.result() for future in futures] for seed, futures in planned.items()}
