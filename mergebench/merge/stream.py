"""Running chains over tensors piece by piece, on several threads, in a fixed order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from mergebench.compute.machine import PAGE
from mergebench.compute.spare import Spare
from mergebench.compute.tiles import Tiling, least_room
from mergebench.merge.abreast import Abreast
from mergebench.merge.ahead import Ahead
from mergebench.merge.at import At, Reading, Stack
from mergebench.merge.chains import granularity_of, needs_base
from mergebench.merge.device.choose import ON_DEVICE, Device
from mergebench.merge.item import Item, located
from mergebench.merge.kernels.fuse import fits, fuse
from mergebench.merge.kernels.ready import kernels
from mergebench.merge.kernels.running import Kernels
from mergebench.merge.op import Chain
from mergebench.merge.runner import Runner
from mergebench.merge.sweep import ItemSweep, Scope

R = TypeVar("R")


class Spread(Protocol):
    """Looks at all tiles of a model, with the help of others."""

    def __call__(
        self, sweep: ItemSweep, scope: Scope, visit: Callable[[Stack, At], R]
    ) -> Iterator[tuple[At, R]]:
        """As :meth:`ItemSweep.here`."""
        ...


@dataclass(eq=False)
class Evaluator:
    """Runs chains over items, measuring what their ops need first.

    Chains that kernels can run are run by them where ``fusing``; ``note`` is told if that takes
    long to begin. With a ``device`` chains are run there instead. Where there is a ``spread``,
    statistics of whole models are left to it.

    Measurements are kept by (the ops up to and including the one that asked, name of the tensor
    or of the part), so that chains with a common beginning share them; so is what ops report.
    """

    items: Mapping[str, Item]
    tiling: Tiling
    pool: Executor
    on_read: Callable[[int], None] = lambda entries: None
    known: dict[tuple[Chain, str], Any] = field(default_factory=dict)
    reports: dict[tuple[Chain, str], tuple[Reading, ...]] = field(default_factory=dict)
    fusing: bool = False
    note: Callable[[str], None] | None = None
    spread: Spread | None = None
    ahead: Ahead = field(default_factory=Ahead)
    device: Device | None = None
    #: For what a worker reads, and for results on their way to a sink.
    read_into: Spare = field(init=False)
    results: Spare = field(init=False)

    def __post_init__(self) -> None:
        models = max((len(item.deltas) for item in self.items.values()), default=0)
        # As wide as Fused.tile makes them; most results are no wider than float32.
        self.read_into = Spare(least_room(models) * self.tiling.tile)
        self.results = Spare(4 * self.tiling.job + PAGE)

    def prepare(self, ops: Chain, item: Item, *, whole: bool = False) -> None:
        """Measure everything that ``ops`` needs before it can run on ``item``.

        With ``whole`` only what is measured over the whole model.
        """
        for end, each in enumerate(ops, start=1):
            statistic = each.statistic
            if statistic is None or (whole and statistic.scope != "model"):
                continue
            name = item.site.name if statistic.scope == "tensor" else item.part
            if (ops[:end], name) in self.known:
                continue
            alone = None if statistic.scope == "model" else item
            scope = Scope(ops[: end - 1], ops[:end], item.part)
            if isinstance(each, Abreast) and end == 1:
                self.known[ops[:end], name] = self._apart(each, scope, alone)
                continue
            self.known[ops[:end], name] = statistic.measure(self._sweep(scope, alone))

    def _apart(self, ops: Abreast, scope: Scope, alone: Item | None) -> list[Any]:
        """What each op must know of its model; no other model is read for it."""
        found: list[Any] = []
        for row, each in enumerate(ops.ops):
            measured = each.statistic
            own = Scope((), (each,), scope.part, row)
            sweep = self._sweep(own, None if alone is None else alone.of(row))
            found.append(None if measured is None else measured.measure(sweep))
        return found

    def _sweep(self, scope: Scope, alone: Item | None) -> ItemSweep:
        if alone is not None:
            return ItemSweep(self, scope.ops, [alone], scope.asking)
        return self.sweep(scope, self.items)

    def sweep(self, scope: Scope, names: Iterable[str]) -> ItemSweep:
        """What a statistic looks at, in these tensors of the model."""
        items = [self.items[name] for name in sorted(names, key=str.encode)]
        own = [item for item in items if item.part == scope.part]
        if scope.row is not None:
            own = [item.of(scope.row) for item in own]
        return ItemSweep(self, scope.ops, own, scope.asking, scope)

    def fused(self, chains: Sequence[Chain], item: Item, unit: int, *, ends: bool) -> Runner | None:
        """The chains for kernels, once what they need has been measured; ``None`` if they cannot.

        With a device they are for that. No tile may cut ``unit`` entries. ``ends`` is false for
        what comes before a measurement.
        """
        if self.device is not None:
            return self._there(self.device, chains, item)
        whole_rows = unit <= max(item.site.row, 1)
        if not self.fusing or item.site.size == 0 or not whole_rows:
            return None

        def known(ops: Chain) -> Any:
            statistic = ops[-1].statistic
            assert statistic is not None
            return self.known[ops, item.site.name if statistic.scope == "tensor" else item.part]

        return fuse(chains, item, known, self._kernels, ends=ends)

    def stores(self, dtype: str) -> bool:
        """Whether kernels, or the device, can round results to a dtype."""
        return dtype in ON_DEVICE if self.device is not None else fits(dtype)

    def _there(self, device: Device, chains: Sequence[Chain], item: Item) -> Runner | None:
        from mergebench.merge.device.tiles import on_device

        wanted = any(needs_base(ops) for ops in chains)

        def run(ops: Chain, at: At, stack: Stack, memo: dict[Chain, Stack] | None) -> Stack:
            return self.run(ops, item, at, stack, memo)

        def place(start: int, stop: int, base: Any) -> At:
            return located(item, start, stop, base, wanted)

        return on_device(device, chains, item, run, place)

    def _kernels(self, rows: bool) -> Kernels | None:
        found = kernels(self.note, rows)
        self.fusing = found is not None
        return found

    # What overflows is found, and refused, where it is rounded.
    @np.errstate(over="ignore", invalid="ignore")
    def run(
        self,
        ops: Chain,
        item: Item,
        at: At,
        stack: Stack,
        memo: dict[Chain, Stack] | None = None,
    ) -> Stack:
        """The chain's result on one tile; ``memo`` shares beginnings between chains."""
        begin, origin, beginning = 0, stack, at
        for end in range(len(ops), 0, -1):
            if memo is not None and ops[:end] in memo:
                stack, begin = memo[ops[:end]], end
                break
        for end, each in enumerate(ops, start=1):
            if end > begin:
                value = None
                if (statistic := each.statistic) is not None:
                    name = item.site.name if statistic.scope == "tensor" else item.part
                    value = self.known[ops[:end], name]
                models = origin if each.spec.needs_models else None
                base = at.base if each.spec.needs_base else None
                here = replace(at, value=value, base=base, models=models)
                before, stack = stack, each.apply(stack, here)
                if each.spec.report is not None:
                    found = each.spec.report(before, stack, here, **dict(each.params))
                    self.reports[ops[:end], item.site.name] = found
                if memo is not None:
                    memo[ops[:end]] = stack
            at = at.after(each, beginning)
        return stack

    def readings(self, ops: Chain, name: str) -> tuple[Reading, ...]:
        """Everything that the ops of a chain have reported about a tensor."""
        ends = range(1, len(ops) + 1)
        return tuple(one for end in ends for one in self.reports.get((ops[:end], name), ()))

    def measured(self, ops: Chain, item: Item) -> dict[Chain, Any]:
        """What was measured of one tensor by ops that correct it, and what they report of it.

        The keys are the ops up to the one that asked.
        """
        found = {}
        for end, each in enumerate(ops, start=1):
            if each.spec.correction is None or (ops[:end], item.site.name) not in self.known:
                continue
            found[ops[:end]] = value = self.known[ops[:end], item.site.name]
            if each.spec.report is not None:
                here = replace(item.at(0, item.site.size), value=value)
                told = each.spec.report(None, None, here, **dict(each.params))
                self.reports[ops[:end], item.site.name] = told
        return found

    def forget(self, name: str) -> None:
        """Let go of what was measured of a single tensor, once it is done with."""
        for key in [(ops, about) for ops, about in self.known if about == name]:
            statistic = key[0][-1].statistic
            if statistic is not None and statistic.scope == "tensor":
                del self.known[key]

    def pieces(self, ops: Iterable[Chain], item: Item) -> tuple[int, list[tuple[int, int]]]:
        """The unit that no tile may cut and the jobs of a tensor."""
        granularity = granularity_of(tuple(each for chain in ops for each in chain))
        unit = self.tiling.unit(granularity, item.site.size, item.site.row)
        return unit, list(self.tiling.jobs(item.site.size, unit))

    def each_job(self, jobs: Iterable[Callable[[], R]], ahead: int | None = None) -> Iterator[R]:
        """Run jobs on the pool and give their results in order, a few jobs ahead."""
        window: deque[Future[R]] = deque()
        limit = ahead if ahead is not None else 2 * self.tiling.workers
        try:
            for job in jobs:
                window.append(self.pool.submit(job))
                if len(window) > limit:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            for future in window:
                future.cancel()
