"""Running chains over tensors piece by piece, on several threads, in a fixed order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mergebench.adapters_zoo.computed import Computed
from mergebench.compute.select import as_numpy
from mergebench.compute.tiles import Tiling
from mergebench.core.delta import Delta, Dense, Difference, LowRank, reads, resident, tile
from mergebench.core.errors import MergebenchError, MismatchError
from mergebench.core.site import Site
from mergebench.core.tensor import Array, Tensor
from mergebench.merge.ahead import Ahead
from mergebench.merge.collected import Slices
from mergebench.merge.device.choose import Device
from mergebench.merge.kernels.fuse import fits, fuse
from mergebench.merge.kernels.ready import kernels
from mergebench.merge.kernels.running import Kernels
from mergebench.merge.op import (
    Abreast,
    At,
    Chain,
    Reading,
    Stack,
    combines,
    granularity_of,
    needs_base,
)
from mergebench.merge.runner import Runner
from mergebench.sources import Applied

#: What a device can round results to.
ON_DEVICE = frozenset({"BF16", "F16", "F32", "F8_E4M3", "F8_E5M2"})
R = TypeVar("R")
Tiles = Iterable[tuple[int, int]]
_RUN = 1024


@dataclass(frozen=True, eq=False)
class Item:
    """One tensor to be merged.

    Attributes
    ----------
    site : Site
    deltas : tuple of Delta or None
        Per model, in canonical order; ``None`` where an adapter does not touch the tensor.
        In weight space the values themselves, as :class:`Dense`.
    weights : tuple of float
        Per model.
    labels : tuple of str
        Per model, for messages.
    base : Tensor or None
        Added to the result; ``None`` in weight space and where the output is a task vector.
    dtype : numpy dtype
        Arithmetic: float32, or float64 if an input is stored so.
    lenient : bool
        Whether entries that are NaN or infinite count as zero, rather than stop the merge.
    origin : Tensor or None
        The base's tensor where there is a base, whether it is added or not; for ops that look
        at its entries.
    keys : tuple of int
        Per model, for counter-based randomness.
    places : tuple of int
        Per model, its place in the order of the user.
    part : str
        Names the part of the model that it belongs to: what is measured over the whole model is
        measured over the items of one part.
    collected : Slices or None
        What was collected of it with data, for chains that ask for it.
    """

    site: Site
    deltas: tuple[Delta | None, ...]
    weights: tuple[float, ...]
    labels: tuple[str, ...]
    base: Tensor | None
    dtype: np.dtype[Any] = field(default=np.dtype(np.float32))
    lenient: bool = False
    origin: Tensor | None = None
    keys: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    part: str = ""
    collected: Slices | None = None

    def at(self, start: int, stop: int) -> At:
        """Entries ``start:stop`` of all models, before any op."""
        return At(self.site, start, stop, self.weights, keys=self.keys, places=self.places)

    def of(self, row: int) -> Item:
        """The tensor of one model alone."""
        own = slice(row, row + 1)
        return replace(
            self,
            deltas=self.deltas[own],
            weights=self.weights[own],
            labels=self.labels[own],
            keys=self.keys[own],
            places=(),
        )


def opened(item: Item) -> Item:
    """The item with low-rank factors read once, for as long as its tiles are worked on."""
    deltas = tuple(None if delta is None else resident(delta) for delta in item.deltas)
    return replace(item, deltas=deltas)


def load(item: Item, start: int, stop: int) -> tuple[Array, Array | None]:
    """The stack of displacements (n, m) and the base's entries (m,), in the arithmetic dtype.

    Raises
    ------
    MergebenchError
        If an input holds NaN or infinity, naming model and tensor; in a lenient item only where
        that is in the factors of an update.
    """
    return load_with_holes(item, start, stop)[:2]


def load_with_holes(
    item: Item, start: int, stop: int
) -> tuple[Array, Array | None, NDArray[np.bool_] | None]:
    """As :func:`load`, and where entries of a lenient item are not finite, (m,), if any are.

    There the displacement of that model (in weight space its value) is zero, and so is the base.
    """
    stack = np.empty((len(item.deltas), stop - start), item.dtype)
    base: Array | None = None
    holes: NDArray[np.bool_] | None = None
    if item.base is not None:
        base = item.base.read(start, stop).astype(item.dtype)
        # Displacements that are not taken from the base do not show what is wrong with it.
        if item.lenient and (holes := _bad(base)) is not None:
            base[holes] = 0
        elif not all(isinstance(delta, Difference) for delta in item.deltas):
            _check_finite(base, item)
    own_holes = holes
    for model, delta in enumerate(item.deltas):
        row = stack[model]
        match delta:
            case None:
                row[:] = 0
            case Difference(finetuned, origin):
                if origin is not item.base or base is None:
                    own = origin.read(start, stop).astype(item.dtype)
                else:
                    own = base
                row[:] = finetuned.read(start, stop)
                with np.errstate(over="ignore", invalid="ignore"):
                    row -= own
                if own is base and own_holes is not None:
                    row[own_holes] = 0
            case Dense(values):
                row[:] = values.read(start, stop)
            case _:
                row[:] = tile(delta, start, stop, item.dtype)
        if item.lenient and (bad := _bad(row)) is not None:
            _check_stored(item, delta, bad, start, stop)
            row[bad] = 0
            holes = bad if holes is None else holes | bad
        elif not item.lenient:
            _check_finite(row, item)
    return stack, base, holes


def _proven(row: Array) -> bool:
    # Finite sums of squares prove finite entries at the cost of one fast product.
    with np.errstate(over="ignore", invalid="ignore"):
        return isfinite(float(np.dot(row, row)))


def located(item: Item, start: int, stop: int, base: Array | None, wanted: bool) -> At:
    """Where a stack stands, with the base's entries and statistics where an op asks for them.

    Parameters
    ----------
    base : array or None
        The entries that :func:`load` has read already.
    wanted : bool
        Whether an op needs them.

    Raises
    ------
    MismatchError
        If there is no base to read them from.
    """
    at = item.at(start, stop)
    if item.collected is not None:
        at = replace(at, collected=item.collected.read(start, stop))
    if not wanted:
        return at
    if base is None:
        if item.origin is None:
            raise MismatchError(
                f"{item.site.name}: the method looks at the base, which does not have this tensor",
                fix="add --base with the model the inputs were fine-tuned from",
            )
        base = item.origin.read(start, stop).astype(item.dtype)
        if item.lenient and (bad := _bad(base)) is not None:
            base[bad] = 0
        elif not item.lenient:
            _check_finite(base, replace(item, base=item.origin))
    return replace(at, base=base)


def _check_finite(row: Array, item: Item) -> None:
    if not _proven(row) and not np.isfinite(row).all():
        raise nonfinite(item)


def _bad(row: Array) -> NDArray[np.bool_] | None:
    """Where entries are not finite; ``None`` if all are."""
    if _proven(row):
        return None
    bad = ~np.isfinite(row)
    return bad if bad.any() else None


def _check_stored(
    item: Item, delta: Delta | None, bad: NDArray[np.bool_], start: int, stop: int
) -> None:
    """Refuse what does not stand in the input as a single entry: factors, and overflow."""
    stored = np.zeros_like(bad)
    for tensor, factor in () if delta is None else _parts(delta):
        if not factor:
            stored |= ~np.isfinite(tensor.read(start, stop).astype(np.float64))
    if (bad & ~stored).any():
        raise nonfinite(item)


def _parts(delta: Delta) -> Iterator[tuple[Tensor, bool]]:
    """The tensors below a displacement, and whether each is a factor (or computed from some)."""
    for tensor in reads(delta):
        if isinstance(tensor, Applied):
            yield tensor.weight, False
            yield from _parts(tensor.delta)
        else:
            yield tensor, isinstance(delta, LowRank) or isinstance(tensor, Computed)


def _too_large(item: Item) -> MergebenchError:
    return MergebenchError(
        f"{item.site.name}: the difference to the base exceeds {item.dtype}",
        fix="store the inputs in float64",
    )


def _stored(item: Item) -> Iterator[tuple[str, Tensor, bool]]:
    """``(whose, tensor, is a factor)`` for everything an item is made of, the base once."""
    seen = set()
    for label, delta in zip(item.labels, item.deltas, strict=True):
        origin = delta.base if isinstance(delta, Difference) else item.base
        for tensor, factor in () if delta is None else _parts(delta):
            under = tensor is origin or tensor is item.base
            if not under or id(tensor) not in seen:
                yield "the base" if under else label, tensor, factor
            seen.add(id(tensor))
    if item.base is not None and id(item.base) not in seen:
        yield "the base", item.base, False


def _count(tensor: Tensor) -> tuple[int, int, int]:
    """How many entries are NaN, how many infinite, of how many."""
    nan = infinite = 0
    size = int(np.prod(tensor.shape))
    for start in range(0, size, 1 << 20):
        piece = tensor.read(start, min(start + (1 << 20), size)).astype(np.float64)
        nan += int(np.isnan(piece).sum())
        infinite += int(np.isinf(piece).sum())
    return nan, infinite, size


def passed_through(item: Item) -> dict[str, int]:
    """How many entries of a lenient item are NaN or infinite, by model (or ``the base``)."""
    found: dict[str, int] = {}
    for label, tensor, _ in _stored(item):
        nan, infinite, _ = _count(tensor)
        if nan or infinite:
            found[label] = found.get(label, 0) + nan + infinite
    return found


def nonfinite(item: Item) -> MergebenchError:
    """The error for NaN or infinity in an input: which model, which tensor, how many."""
    for label, tensor, factor in _stored(item):
        if item.lenient and not factor:
            continue
        nan, infinite, size = _count(tensor)
        if nan or infinite:
            return MergebenchError(
                f"{label}: tensor {item.site.name!r} has {nan} NaN and {infinite} infinite "
                f"entries of {size}",
                fix="repair or replace that model"
                + (
                    "; one such number spoils a row or column of the update, which "
                    "--allow-nonfinite does not pass on"
                    if factor
                    else ", or pass these entries on with --allow-nonfinite"
                ),
            )
    return _too_large(item)


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
        """Run ``visit`` on some of the tiles only, named by tensor and entries."""
        for item in self.items:
            own = [(start, stop) for name, start, stop in spans if name == item.site.name]
            ready = opened(item) if own else item
            for start, stop in own:
                with np.errstate(over="ignore", invalid="ignore"):
                    for at, stack in self._by_ops(ready, [(start, stop)]):
                        yield at, visit(stack, at)

    def _jobs(self, visit: Callable[[Stack, At], R]) -> Iterator[Callable[[], list[tuple[At, R]]]]:
        for item in self.items:
            self.owner.prepare(self.ops, item)
            unit, jobs = self.owner.pieces([self.asking], item)
            ready = opened(item)
            fused = self._fused(ready, unit)
            for start, stop in jobs:
                self.owner.ahead.comes(item.site.name, start, stop)
                tiles = partial(self.owner.tiling.tiles, start, stop, unit)
                if fused is None:
                    yield partial(self._ops_job, visit, ready, tiles)
                else:
                    yield partial(self._fused_job, visit, ready, fused, unit, (start, stop))

    # What overflows is found, and refused, where it is rounded.
    @np.errstate(over="ignore", invalid="ignore")
    def _ops_job(
        self, visit: Callable[[Stack, At], R], item: Item, tiles: Callable[[], Tiles]
    ) -> list[tuple[At, R]]:
        return [(at, visit(stack, at)) for at, stack in self._by_ops(item, tiles())]

    @np.errstate(over="ignore", invalid="ignore")
    def _fused_job(
        self,
        visit: Callable[[Stack, At], R],
        item: Item,
        fused: Runner,
        unit: int,
        job: tuple[int, int],
    ) -> list[tuple[At, R]]:
        by_kernel = getattr(visit, "by_kernel", None)
        narrow, found = self.owner.tiling.tile, []
        wide = fused.tile(narrow, unit)
        room = fused.buffers(wide)
        looking = fused.looking(room)
        for begin in range(*job, wide):
            end = min(begin + wide, job[1])
            at = self.after(item.at(begin, end))
            room.read(begin, end)
            result = None if by_kernel is None else by_kernel(looking, at)
            if result is not None:
                found.append((at, result))
                continue
            stack = fused.stack(room)
            if stack is None:
                tiles = self.owner.tiling.tiles(begin, end, unit)
                found += [(at, visit(stack, at)) for at, stack in self._by_ops(item, tiles)]
            else:
                at = at if self.ops else replace(at, models=stack)
                found.append((at, visit(stack, at)))
        return found

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

    def sample(self, count: int) -> Stack:
        """Runs of entries, evenly spread over the scope."""
        runs = max(count // _RUN, 1)
        stride = max(self.size / runs, 1.0)
        parts, offset, wanted = [], 0, 0.0
        for item in self.items:
            unit, _ = self.owner.pieces([self.asking], item)
            size = item.site.size
            if wanted < offset + size:
                self.owner.prepare(self.ops, item)
            ready = opened(item) if wanted < offset + size else item
            fused = self._fused(ready, unit) if wanted < offset + size else None
            run = max(_RUN // unit, 1) * unit
            room = None if fused is None else fused.buffers(run)
            while wanted < offset + size:
                begin = int(wanted - offset) // unit * unit
                end = min(begin + run, size)
                parts.append(self._run(ready, begin, end, fused, room))
                wanted += stride
            offset += size
        return np.concatenate(parts, axis=1)

    def _run(self, item: Item, begin: int, end: int, fused: Runner | None, room: Any) -> Stack:
        if fused is not None and room is not None:
            room.read(begin, end)
            if (stack := fused.stack(room)) is not None:
                return as_numpy(stack)
        ((_, stack),) = self._by_ops(item, [(begin, end)])
        return stack
