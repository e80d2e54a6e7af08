"""How tensors are cut into tiles, and what that costs in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: Entries of a tile when memory is no concern: three float32 models of it fit a core's caches.
TILE = 1 << 16
#: Entries handed to a worker at once.
JOB = 1 << 20
_LEAST_TILE = 1 << 12


@dataclass(frozen=True)
class Tiling:
    """Sizes of the pieces a merge works on.

    Attributes
    ----------
    tile, job : int
        Entries computed at once by a worker, and entries handed to a worker at once. A row or a
        tensor that may not be cut makes both larger where it needs to.
    workers : int
        Threads that read and compute.
    """

    tile: int = TILE
    job: int = JOB
    workers: int = 1

    def unit(self, granularity: str, size: int, row: int) -> int:
        """The smallest number of entries that may stand alone."""
        return {"entry": 1, "row": max(row, 1), "tensor": max(size, 1)}[granularity]

    def step(self, unit: int) -> int:
        """Entries of a tile of whole units."""
        return max(self.tile // unit, 1) * unit

    def tiles(self, start: int, stop: int, unit: int) -> Iterator[tuple[int, int]]:
        """Cut a job into tiles of whole units."""
        step = self.step(unit)
        for begin in range(start, stop, step):
            yield begin, min(begin + step, stop)

    def jobs(self, size: int, unit: int) -> Iterator[tuple[int, int]]:
        """Cut a tensor into jobs of whole tiles."""
        tile = self.step(unit)
        step = max(self.job // tile, 1) * tile
        for begin in range(0, size, step):
            yield begin, min(begin + step, size)


@dataclass(frozen=True)
class Load:
    """What decides the memory of a merge.

    Attributes
    ----------
    models, outputs : int
    itemsize, out_itemsize : int
        Bytes of an entry in arithmetic and in the outputs.
    unit : int
        The largest piece that may not be cut, in entries.
    fixed : int
        Bytes that do not depend on the tiling (threshold search, dense matrices).
    largest : int
        Entries of the largest tensor.
    shared : int
        Stacks kept for other outputs.
    workspace : int
        Bytes that an op holds beside its stack while it works on a tensor.
    factors : tuple of (int, int)
        Per tensor its entries and the bytes of low-rank factors held while it is worked on.
    """

    models: int
    outputs: int
    itemsize: int
    out_itemsize: int
    unit: int
    fixed: int
    largest: int
    shared: int = 0
    workspace: int = 0
    factors: tuple[tuple[int, int], ...] = ()

    def bytes(self, tiling: Tiling) -> int:
        """Anonymous memory of a merge with this tiling, above the imported libraries."""
        tile = min(max(tiling.tile, self.unit), max(self.largest, 1))
        job = min(max(tiling.job, tile), max(self.largest, 1))
        stacks = _stacks(self.models, self.outputs, self.shared)
        working = tile * self.itemsize * stacks + self.workspace
        queued = job * self.out_itemsize * self.outputs
        window = 2 * tiling.workers + 1
        return self.fixed + self._held(job, window) + tiling.workers * working + window * queued

    def _held(self, job: int, window: int) -> int:
        """Factors of the tensors whose jobs can stand in the window together.

        Those of many jobs share it two at a time, small ones as many as it has jobs.
        """
        if not self.factors:
            return 0
        largest = max(held for _, held in self.factors)
        per_job = max(held / max(-(-size // job), 1) for size, held in self.factors)
        return 2 * largest + int(window * per_job)


def _stacks(models: int, outputs: int = 1, shared: int = 0) -> int:
    """Numbers that a worker holds for every entry of a tile."""
    # What was read, the float stack, and about two more of it in temporaries.
    return (4 + shared) * models + 6 + 2 * outputs


def least_room(models: int) -> int:
    """Bytes that every merge of so many models may take for an entry of a tile."""
    return 4 * _stacks(models)


def fit(load: Load, budget: int, workers: int) -> tuple[Tiling, int]:
    """The largest tiling within ``budget`` bytes and the least memory that any tiling needs.

    The returned tiling may exceed the budget if even the least one does; the caller refuses.
    """
    tile = TILE
    job = JOB
    count = workers
    least = load.bytes(Tiling(_LEAST_TILE, _LEAST_TILE, 1))
    while load.bytes(Tiling(tile, job, count)) > budget:
        if job > tile:
            job //= 2
        elif tile > _LEAST_TILE:
            tile //= 2
            job = tile
        elif count > 1:
            count -= 1
        else:
            break
    return Tiling(tile, job, count), least
