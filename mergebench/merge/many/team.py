"""What a numbered worker does: its own units, those of the dead, and waiting for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any

from mergebench.checkpoints.placed import Staged
from mergebench.core.errors import ResourceError
from mergebench.merge.at import At, Stack
from mergebench.merge.engine import Progress, fuses, workers
from mergebench.merge.many.board import Board
from mergebench.merge.many.labour import Merged, look, measure_whole, merge_unit, seen
from mergebench.merge.many.leases import Watch, beat_of
from mergebench.merge.many.units import Unit, owners, units_of
from mergebench.merge.outcome import Found
from mergebench.merge.plan import Plan
from mergebench.merge.stream import Evaluator
from mergebench.merge.sweep import ItemSweep, Scope

#: Seconds between looks at what others have done: at first, and after some waiting.
_LOOKS = 0.02, 1.0
#: Seconds for which nothing need be said about waiting.
_SILENT = 5.0


@dataclass(frozen=True)
class Seat:
    """Which worker this is, of how many."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(eq=False)
class Team:
    """One merge, as one of its workers sees it.

    Attributes
    ----------
    plan : Plan
    board : Board
        Where workers find what others have done.
    seat : Seat
    staged : sequence of Staged
        The outputs, in the order of ``plan.variants``.
    watch : Watch
    wait : float
        Seconds to wait for a worker that has not started.
    progress, note : callable or None
    """

    plan: Plan
    board: Board
    seat: Seat
    staged: Sequence[Staged]
    watch: Watch
    wait: float
    progress: Progress | None
    note: Callable[[str], None] | None
    _sweeps: int = 0
    _done: int = 0
    _said: set[str] = field(default_factory=set)
    _units: tuple[Unit, ...] = field(init=False)
    _owners: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._units = units_of(self.plan)
        self._owners = owners(self._units, self.seat.count)

    def run(self) -> tuple[Found, list[dict[str, str]]]:
        """Do what is to be done, and return once all of it is, by whomever.

        Raises
        ------
        ResourceError
            If a worker that is needed has not started in time.
        MergebenchError
            For what the data show, as in :func:`mergebench.merge.engine.execute`.
        """
        plan = self.plan
        found, digests = Found.nothing(plan), [dict[str, str]() for _ in plan.variants]
        layouts = [plan.package.layout_of(variant) for variant in plan.variants]
        places = list(zip(self.staged, layouts, strict=True))
        with workers(plan.tiling.workers) as pool:
            evaluator = Evaluator(
                plan.aligned.items, plan.tiling, pool, fusing=fuses(plan), note=self.note,
                spread=self._spread, device=plan.device,
            )  # fmt: skip
            measure_whole(plan, evaluator)

            def merge(unit: Unit) -> Merged:
                return merge_unit(plan, evaluator, unit.names, places, self._merged)

            merged: Merged
            for _, merged in self._each("merged", self._units, merge):
                for name, outcome in merged.outcomes.items():
                    found.add(name, outcome)
                for own, all_of in zip(merged.digests, digests, strict=True):
                    all_of.update(own)
        return found, digests

    def _spread(
        self, sweep: ItemSweep, scope: Scope, visit: Callable[[Stack, At], Any]
    ) -> Iterator[tuple[At, Any]]:
        """A sweep over the whole model, of which every worker makes its share."""
        del scope
        # All workers measure the same in the same order, so that a number names a sweep.
        self._sweeps += 1
        own = {item.site.name: item for item in sweep.items}
        units = [unit for unit in self._units if own.keys() & set(unit.names)]

        def share(unit: Unit) -> ItemSweep:
            items = [own[name] for name in unit.names if name in own]
            return ItemSweep(sweep.owner, sweep.ops, items, sweep.asking)

        def work(unit: Unit) -> Any:
            return look(share(unit), visit)

        for unit, looks in self._each(f"sweep{self._sweeps}", units, work):
            yield from seen(sweep, looks)
            self._count("measuring", sum(item.site.size for item in share(unit).items))

    def _each(
        self, what: str, units: Sequence[Unit], work: Callable[[Unit], Any]
    ) -> Iterator[tuple[Unit, Any]]:
        """The results of all units, in order; those of this worker are made first."""
        for unit in units:
            if self._owner(unit) == self.seat.number:
                self._do(what, unit, work)
        since, left = monotonic(), len(units)
        while missing := self._missing(what, units):
            if len(missing) < left:
                since, left = monotonic(), len(missing)
            states = {owner: self._state(owner) for owner in map(self._owner, missing)}
            dead = [unit for unit in missing if states[self._owner(unit)] == "dead"]
            if dead:
                self._take_over(what, dead, work)
            else:
                absent = [owner for owner, state in states.items() if state == "absent"]
                self._pause(sorted(absent), sorted(states), monotonic() - since)
        for unit in units:
            yield unit, self._result(what, unit, work)

    def _missing(self, what: str, units: Sequence[Unit]) -> list[Unit]:
        there = self.board.names()
        return [unit for unit in units if _named(what, unit) not in there]

    def _owner(self, unit: Unit) -> int:
        return self._owners[unit.number]

    def _do(self, what: str, unit: Unit, work: Callable[[Unit], Any]) -> None:
        if self.board.has(_named(what, unit)):
            return
        result = work(unit)
        try:
            self.board.put(_named(what, unit), (True, result))
        except TypeError:
            # Of what cannot be left to others, everybody makes their own.
            self.board.put(_named(what, unit), (False, None))

    def _result(self, what: str, unit: Unit, work: Callable[[Unit], Any]) -> Any:
        try:
            left, result = self.board.get(_named(what, unit))
        except FileNotFoundError:
            self._do(what, unit, work)
            left, result = self.board.get(_named(what, unit))
        return result if left else work(unit)

    def _take_over(self, what: str, dead: Sequence[Unit], work: Callable[[Unit], Any]) -> None:
        """Do a unit of a worker that has died."""
        # Others who wait begin elsewhere.
        unit = dead[len(dead) * self.seat.number // self.seat.count]
        self._say(f"worker {self._seats([self._owner(unit)])} has died; doing its work")
        self._do(what, unit, work)

    def _state(self, owner: int) -> str:
        # This process may have found a result of its own damaged.
        if owner == self.seat.number:
            return "dead"
        return self.watch.state(beat_of(self.board.folder, owner))

    def _pause(self, absent: Sequence[int], missing: Sequence[int], waited: float) -> None:
        who = self._seats(absent or missing)
        if absent and waited > self.wait:
            raise ResourceError(
                f"not started: worker {who}",
                got=f"nothing from there for {self.wait:g} s",
                fix="start what is missing: the same command with its --worker and the same disk",
            )
        if absent:
            self._say(f"waiting up to {self.wait:g} s for the start of worker {who}")
        elif waited > _SILENT:
            self._say(f"waiting for what worker {who} is doing")
        self._count(f"waiting for {who}", 0)
        sleep(min(max(waited / 4, _LOOKS[0]), _LOOKS[1]))

    def _seats(self, numbers: Sequence[int]) -> str:
        return ", ".join(str(Seat(each, self.seat.count)) for each in numbers)

    def _say(self, sentence: str) -> None:
        if self.note is not None and sentence not in self._said:
            self.note(sentence)
            self._said.add(sentence)

    def _merged(self, entries: int) -> None:
        self._count("merging", entries)

    def _count(self, what: str, entries: int) -> None:
        self._done += entries
        total = self.plan.entries * self.plan.passes
        if self.progress is not None:
            self.progress(what, min(self._done, total), total)


def _named(what: str, unit: Unit) -> str:
    return f"{what}-{unit.number}"
