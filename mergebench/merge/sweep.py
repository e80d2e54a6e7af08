"""All tiles of some items, for what is measured before a chain can run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mergebench.compute.namespace import as_numpy
from mergebench.merge.at import At, Stack
from mergebench.merge.chains import combines, needs_base
from mergebench.merge.item import Item, load, located, opened
from mergebench.merge.op import Chain
from mergebench.merge.runner import Room, Runner

if TYPE_CHECKING:
    from mergebench.merge.stream import Evaluator

R = TypeVar("R")
Tiles = Iterable[tuple[int, int]]
#: Entries of a run that is sampled, and runs that a worker takes at once.
_RUN, _RUNS = 1024, 16


@dataclass(frozen=True)
class Scope:
    """What a statistic of a whole model looks at, in words that another process understands.

    Attributes
    ----------
    ops : Chain
        Run before visitors look.
    asking : Chain
        The same and the op that asks.
    part : str
        Of the items.
    row : int or None
        The only model that is looked at, where each has an op of its own.
    """

    ops: Chain
    asking: Chain
    part: str
    row: int | None = None


@dataclass(eq=False)
class ItemSweep:
    """All tiles of some items, after the ops that come before a statistic.

    Attributes
    ----------
    ops : Chain
        Run before visitors look.
    asking : Chain
        The same and the op that asks, which decides what visitors can look at.
    scope : Scope or None
        Where the items are those of a whole model.
    """

    owner: Evaluator
    ops: Chain
    items: Sequence[Item]
    asking: Chain
    scope: Scope | None = None

    @property
    def models(self) -> int:
        """Rows of the stacks given to visitors."""
        if combines(self.ops):
            return 1
        return len(self.items[0].deltas) if self.items else 0

    @property
    def size(self) -> int:
        """Entries per model."""
        return sum(item.site.size for item in self.items)

    @property
    def inputs(self) -> int:
        """Task vectors per item, before any op."""
        return len(self.items[0].deltas) if self.items else 0

    def __call__(self, visit: Callable[[Stack, At], R]) -> Iterator[tuple[At, R]]:
        """Run ``visit`` on every tile; results in (tensor name, flat index) order."""
        if self.scope is None or self.owner.spread is None:
            return self.here(visit)
        return self.owner.spread(self, self.scope, visit)

    def here(self, visit: Callable[[Stack, At], R]) -> Iterator[tuple[At, R]]:
        """The same in this process."""
        ahead = self.owner.ahead
        with ahead.along(self.items):
            for results in self.owner.each_job(self._jobs(visit)):
                self.owner.on_read(sum(at.stop - at.start for at, _ in results))
                first, last = results[0][0], results[-1][0]
                ahead.read(first.site.name, first.start, last.stop, last=False)
                yield from results

    def again(
        self, visit: Callable[[Stack, At], R], spans: Collection[tuple[str, int, int]]
    ) -> Iterator[tuple[At, R]]:
        """Run ``visit`` on some entries only, named by tensor, first and last, tile by tile."""
        for results in self.owner.each_job(self._jobs_again(visit, spans)):
            yield from results

    def _jobs_again(
        self, visit: Callable[[Stack, At], R], spans: Collection[tuple[str, int, int]]
    ) -> Iterator[Callable[[], list[tuple[At, R]]]]:
        for item in self.items:
            own = sorted((start, stop) for name, start, stop in spans if name == item.site.name)
            if own:
                yield from map(partial(partial, self._job(visit, item)), own)

    def _jobs(self, visit: Callable[[Stack, At], R]) -> Iterator[Callable[[], list[tuple[At, R]]]]:
        for item in self.items:
            self.owner.prepare(self.ops, item)
            _, jobs = self.owner.pieces([self.asking], item)
            work = self._job(visit, item)
            for start, stop in jobs:
                self.owner.ahead.comes(item.site.name, stop)
                yield partial(work, (start, stop))

    def _job(
        self, visit: Callable[[Stack, At], R], item: Item
    ) -> Callable[[tuple[int, int]], list[tuple[At, R]]]:
        """What looks at some entries of an item."""
        unit, _ = self.owner.pieces([self.asking], item)
        ready = opened(item)
        fused = self._fused(ready, unit)
        if fused is None:
            return partial(self._ops_job, visit, ready, unit)
        return partial(self._fused_job, visit, ready, fused, unit)

    # What overflows is found, and refused, where it is rounded.
    @np.errstate(over="ignore", invalid="ignore")
    def _ops_job(
        self, visit: Callable[[Stack, At], R], item: Item, unit: int, job: tuple[int, int]
    ) -> list[tuple[At, R]]:
        tiles = self.owner.tiling.tiles(*job, unit)
        return [(_bare(at), visit(stack, at)) for at, stack in self._by_ops(item, tiles)]

    def _fused_job(
        self,
        visit: Callable[[Stack, At], R],
        item: Item,
        fused: Runner,
        unit: int,
        job: tuple[int, int],
    ) -> list[tuple[At, R]]:
        by_kernel = getattr(visit, "by_kernel", None)
        tiling, found = self.owner.tiling, []
        wide = fused.tile(tiling.tile, unit) if by_kernel is not None else tiling.step(unit)
        with Room(fused, wide, self.owner.read_into) as room:
            for begin in range(*job, wide):
                end = min(begin + wide, job[1])
                if by_kernel is not None:
                    at = self.after(item.at(begin, end))
                    room.buffers.read(begin, end)
                    result = by_kernel(fused.looking(room.buffers), at)
                    if result is not None:
                        found.append((at, result))
                        continue
                # A float32 stack and what visitors make of it are larger than what was read.
                for span in tiling.tiles(begin, end, unit):
                    found += self._visited(visit, item, fused, unit, room, span)
        return found

    # What overflows is found, and refused, where it is rounded.
    @np.errstate(over="ignore", invalid="ignore")
    def _visited(
        self,
        visit: Callable[[Stack, At], R],
        item: Item,
        fused: Runner,
        unit: int,
        room: Room,
        span: tuple[int, int],
    ) -> list[tuple[At, R]]:
        room.buffers.read(*span)
        stack = fused.stack(room.buffers)
        if stack is None:
            room.leave()
            return self._ops_job(visit, item, unit, span)
        at = self.after(item.at(*span))
        return [(at, visit(stack, at if self.ops else replace(at, models=stack)))]

    def _fused(self, item: Item, unit: int) -> Runner | None:
        """What comes before the statistic, for kernels; ``None`` where more is looked at."""
        spec = self.asking[-1].spec
        more = spec.needs_base or (spec.needs_models and self.ops) or item.collected is not None
        if more:
            return None
        return self.owner.fused([self.ops], item, unit, ends=False)

    def _by_ops(self, item: Item, tiles: Tiles) -> Iterator[tuple[At, Stack]]:
        for begin, end in tiles:
            raw, base = load(item, begin, end)
            at = located(item, begin, end, base, needs_base(self.asking))
            stack = self.owner.run(self.ops, item, at, raw)
            yield replace(self.after(at), models=raw), stack

    def after(self, at: At) -> At:
        """A place as it is once the ops have run."""
        found = at
        for each in self.ops:
            found = found.after(each, at)
        return found

    def each_job(self, jobs: Iterable[Callable[[], R]]) -> Iterator[R]:
        """Results of any jobs, in order, on the threads that look at tiles."""
        return self.owner.each_job(jobs)

    def sample(self, count: int) -> Stack:
        """Runs of entries, evenly spread over the scope."""
        return np.concatenate(list(self.owner.each_job(self._sampling(count))), axis=1)

    def _sampling(self, count: int) -> Iterator[Callable[[], Stack]]:
        runs = max(count // _RUN, 1)
        stride = max(self.size / runs, 1.0)
        offset, wanted = 0, 0.0
        for item in self.items:
            unit, _ = self.owner.pieces([self.asking], item)
            begins, size = [], item.site.size
            while wanted < offset + size:
                begins.append(int(wanted - offset) // unit * unit)
                wanted += stride
            offset += size
            if not begins:
                continue
            self.owner.prepare(self.ops, item)
            ready = opened(item)
            fused = self._fused(ready, unit)
            run = max(_RUN // unit, 1) * unit
            for some in range(0, len(begins), _RUNS):
                yield partial(self._runs, ready, begins[some : some + _RUNS], run, fused)

    def _runs(self, item: Item, begins: Sequence[int], length: int, fused: Runner | None) -> Stack:
        spans = [(begin, min(begin + length, item.site.size)) for begin in begins]
        if fused is None:
            return np.concatenate([self._run_by_ops(item, span) for span in spans], axis=1)
        parts = []
        total = sum(stop - start for start, stop in spans)
        with Room(fused, total, self.owner.read_into) as room:
            together = fused.runs(room.buffers, spans)
            if together is not None:
                return as_numpy(together)
            for span in spans:
                room.buffers.read(*span)
                stack = fused.stack(room.buffers)
                parts.append(self._run_by_ops(item, span) if stack is None else as_numpy(stack))
        return np.concatenate(parts, axis=1)

    # What overflows is found, and refused, where it is rounded.
    @np.errstate(over="ignore", invalid="ignore")
    def _run_by_ops(self, item: Item, span: tuple[int, int]) -> Stack:
        ((_, stack),) = self._by_ops(item, [span])
        return stack


def _bare(at: At) -> At:
    """A place without the entries there, which results that wait would hold on to."""
    return replace(at, models=None, base=None, collected=None)
