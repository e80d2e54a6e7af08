"""What is asked for before it is read, and let go after it was: the policy, not the system calls.

Inputs that come over a network are asked for ahead always. Files are let go of in runs that read
and write more than the page cache should hold, and in those of slow disks they are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from mergebench.checkpoints import page_cache
from mergebench.checkpoints.pace import to_ask
from mergebench.compute.machine import PAGE
from mergebench.core.delta import Delta, LowRank, reads
from mergebench.core.extents import Extent, Store, extents
from mergebench.core.tensor import Tensor, nbytes, size_of

if TYPE_CHECKING:
    from mergebench.merge.item import Item
    from mergebench.merge.plan import Plan

#: Bytes, over all inputs, that are asked for before they are read; and at a time.
WINDOW, PIECE = 1 << 25, 1 << 23
#: Bytes of one file that are let go of at a time.
STEP = 1 << 23


@dataclass(frozen=True, eq=False)
class Step:
    """One tensor of the merge, and what is read for it.

    Attributes
    ----------
    name : str
    size : int
        Entries.
    rows : tuple of Tensor
        Read entry by entry, in parallel.
    others : tuple of Tensor
        Factors, which are read as a whole.
    """

    name: str
    size: int
    rows: tuple[Tensor, ...]
    others: tuple[Tensor, ...] = ()

    @property
    def width(self) -> int:
        """Bytes of one entry, over all rows."""
        return sum(nbytes(row.dtype, ()) for row in self.rows)

    def lies(self, start: int, stop: int) -> Iterator[Extent]:
        """Where entries of the rows lie."""
        for row in self.rows:
            yield from extents(row, start, stop)

    def whole(self) -> Iterator[Extent]:
        """Where everything lies that is read for the tensor."""
        yield from self.lies(0, self.size)
        for other in self.others:
            yield from extents(other, 0, size_of(other.shape))


def step_of(item: Item) -> Step:
    """What is read for an item."""
    rows: dict[int, Tensor] = {}
    others: list[Tensor] = []
    for tensor in (item.base, item.origin):
        if tensor is not None:
            rows[id(tensor)] = tensor
    for delta in item.deltas:
        if isinstance(delta, LowRank):
            others += reads(delta)
        elif delta is not None:
            rows |= {id(each): each for each in _rows(delta)}
    return Step(item.site.name, item.site.size, tuple(rows.values()), tuple(others))


def _rows(delta: Delta) -> Iterator[Tensor]:
    yield from (tensor for tensor in reads(delta) if tensor.shape == delta.shape)


@dataclass(eq=False)
class _Line:
    """Tensors in the order in which they are read once, and how far they have been asked for."""

    steps: Sequence[Step]
    begins: dict[str, int] = field(default_factory=dict)
    by_name: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        position = 0
        for step in self.steps:
            self.begins[step.name], self.by_name[step.name] = position, step
            position += step.width * step.size
        self._asked = 0
        self._pieces = self._cut()

    def _cut(self) -> Iterator[tuple[Step, int, int]]:
        for step in self.steps:
            entries = max(PIECE // max(step.width, 1), 1)
            for start in range(0, step.size, entries):
                yield step, start, min(start + entries, step.size)

    def until(self, name: str, stop: int) -> Iterator[tuple[Step, int, int]]:
        """Pieces to ask for where a tensor is read up to entry ``stop``, each of them once."""
        reached = self.begins[name] + self.by_name[name].width * stop
        while self._asked < reached + WINDOW:
            if (piece := next(self._pieces, None)) is None:
                return
            step, _, end = piece
            self._asked = self.begins[step.name] + step.width * end
            # What is read by now needs no asking.
            if self._asked > reached:
                yield piece


class Ahead:
    """Asks for what is read next, and lets go of what was read for the last time.

    Not safe under threads: one of them hands out the work, and collects it.

    Parameters
    ----------
    steps : sequence of Step
        All that is read, in the order of the last reading; none to do nothing.
    room : int or None
        Bytes that may stay in the page cache between a reading and the last; ``None`` to leave
        files alone, and to ask only for what comes over a network.
    ask : collection of Store or None
        What is asked for, of what would be; ``None`` for all of it.
    """

    def __init__(
        self,
        steps: Sequence[Step] = (),
        room: int | None = None,
        ask: Collection[Store] | None = None,
    ) -> None:
        self.room = room
        self._ask = ask
        self._lines = [_Line(steps)]
        self._uses: Counter[tuple[int, int]] = Counter()
        for step in steps:
            self._uses.update(set(map(_key, self._mine(step.whole()))))
        #: Bytes that stay for the last reading, by tensor.
        self._kept: dict[str, int] = {}
        self._held = 0
        #: What is done with: in the last reading, and in the one that goes on before it.
        self._done: dict[Store, _Done] = {}
        self._passed: dict[Store, _Done] = {}

    @property
    def large(self) -> bool:
        """Whether files are let go of."""
        return self.room is not None

    def _mine(self, found: Iterable[Extent]) -> Iterator[Extent]:
        for extent in found:
            if extent.length and (self.room is not None or extent.store.far):
                yield extent

    @contextmanager
    def along(self, items: Sequence[Item]) -> Iterator[None]:
        """While other items are read, in this order, and not for the last time."""
        # After one tensor by itself come those of the last reading.
        several = len(items) > 1 and self._lines[0].steps
        line = _Line([step_of(item) for item in items]) if several else self._lines[-1]
        self._lines.append(line)
        try:
            yield
        finally:
            self._lines.remove(line)
            _tell(self._passed)

    def comes(self, name: str, stop: int) -> None:
        """Say that a tensor is about to be read up to entry ``stop``."""
        line = self._lines[-1]
        if name not in line.by_name:
            return
        for step, begin, end in line.until(name, stop):
            for store, offset, length in self._mine(step.lies(begin, end)):
                if self._ask is None or store in self._ask:
                    store.advise(offset, length, "willneed")

    def read(self, name: str, start: int, stop: int, *, last: bool) -> None:
        """Say that entries ``start:stop`` of a tensor have been read, maybe for the last time."""
        if (step := self._lines[-1].by_name.get(name)) is None:
            return
        if last or not self._keep(step, start, stop):
            where = self._done if last else self._passed
            for row in step.rows:
                if not last or self._alone(row, step.size):
                    for extent in self._mine(extents(row, start, stop)):
                        _add(extent, where)

    def _alone(self, row: Tensor, size: int) -> bool:
        """Whether nothing else is read from there later."""
        return all(self._uses[_key(extent)] <= 1 for extent in extents(row, 0, size))

    def _keep(self, step: Step, start: int, stop: int) -> bool:
        """Whether there is room for what will be read again."""
        if self.room is None:
            return True
        kept, whole = self._kept.get(step.name, 0), step.size * step.width
        more = min((stop - start) * step.width, whole - kept)
        if self._held + more > self.room:
            return False
        self._kept[step.name] = kept + more
        self._held += more
        return True

    def finished(self, name: str) -> None:
        """Say that a tensor is done with."""
        if (step := self._lines[0].by_name.get(name)) is None:
            return
        self._held -= self._kept.pop(name, 0)
        # An adapter's base may be the base besides.
        for key, extent in {_key(each): each for each in self._mine(step.whole())}.items():
            self._uses[key] -= 1
            if self._uses[key] == 0:
                _add(extent, self._done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of what is left of that, also after an error."""
        _tell(self._passed)
        _tell(self._done)


class _Done:
    """The stretch of a store that is done with, told in steps.

    Always from its beginning: pages that were on their way, or that reach beyond an end, stay
    the first time.
    """

    def __init__(self, store: Store, start: int) -> None:
        self.store = store
        self.start = self.stop = self.told = start

    def add(self, extent: Extent) -> None:
        if not self.start <= extent.offset <= self.stop + PAGE:
            self.tell()
            self.start = self.stop = self.told = extent.offset
        self.stop = max(self.stop, extent.end)
        if self.stop - self.told >= STEP:
            self.tell()

    def tell(self) -> None:
        if self.stop > self.told:
            self.store.advise(self.start, self.stop - self.start, "dontneed")
            self.told = self.stop


def _add(extent: Extent, where: dict[Store, _Done]) -> None:
    if (done := where.get(extent.store)) is None:
        done = where[extent.store] = _Done(extent.store, extent.offset)
    done.add(extent)


def _tell(where: dict[Store, _Done]) -> None:
    for done in where.values():
        done.tell()
    where.clear()


def _key(extent: Extent) -> tuple[int, int]:
    return id(extent.store), extent.offset


def room_of(plan: Plan) -> int | None:
    """Bytes of the page cache that a large run may take; ``None`` for a run it has room for."""
    moved = plan.read_bytes + plan.write_bytes
    if moved <= page_cache.LITTLE and not page_cache.asked():
        return None
    room = page_cache.limit()
    return None if room is not None and moved <= room else room


def ahead_of(plan: Plan, room: int | None) -> Ahead:
    """The policy of a run that has this room (:func:`room_of`); a large one tries its disks.

    Raises
    ------
    MergebenchError
        If an input cannot be read.
    """
    items, copies, own = plan.aligned.items, plan.aligned.copies, plan.aligned.own
    steps = []
    for name in plan.aligned.order:
        if name in items:
            steps.append(step_of(items[name]))
        else:
            tensors = own.get(name) or (copies[name],)
            steps.append(Step(name, size_of(copies[name].shape), tuple(tensors)))
    stores = {each.store for step in steps for each in step.whole()}
    if room is not None:
        return Ahead(steps, room, to_ask(stores))
    return Ahead(steps) if any(store.far for store in stores) else Ahead()
