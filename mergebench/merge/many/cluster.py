"""A merge by the workers of a Dask cluster that share a disk with this process."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.checkpoints.writer import Output
from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.version import own_version
from mergebench.merge.at import At, Stack
from mergebench.merge.engine import Progress, fuses, workers
from mergebench.merge.many.agree import marks_of
from mergebench.merge.many.hands import Hands
from mergebench.merge.many.labour import Merged, measure_whole, seen, whole_only
from mergebench.merge.many.units import Unit, units_of
from mergebench.merge.one_tensor import targets_of
from mergebench.merge.outcome import Found, earlier, record
from mergebench.merge.plan import Plan
from mergebench.merge.resume import Ledger
from mergebench.merge.stream import Evaluator
from mergebench.merge.sweep import ItemSweep, Scope

if TYPE_CHECKING:
    from distributed import Client

Note = Callable[[str], None]


@contextmanager
def connected(scheduler: Any) -> Iterator[Client]:
    """A client of a Dask scheduler, closed at the end if it was opened here.

    Parameters
    ----------
    scheduler : str or Client
        An address such as ``tcp://10.0.0.1:8786``, the path of a scheduler file, or a client.

    Raises
    ------
    MergebenchError
        If nobody answers there.
    """
    from distributed import Client

    if isinstance(scheduler, Client):
        yield scheduler
        return
    is_file = Path(scheduler).is_file()
    where = {"scheduler_file": scheduler} if is_file else {"address": scheduler}
    try:
        client = Client(**where, set_as_default=False)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise MergebenchError(
            f"{scheduler}: no Dask scheduler answers there",
            got=str(error) or type(error).__name__,
            fix="start one with `dask scheduler`, or correct --scheduler",
        ) from error
    try:
        yield client
    finally:
        client.close()


@dataclass(frozen=True, eq=False)
class ClusterRun:
    """A way to fill the outputs of a plan: see :class:`mergebench.merge.engine.Run`.

    Attributes
    ----------
    client : Client
    memory : int, bytes
        Of each worker process.
    stream : bool
        As in :func:`mergebench.merge.planning.make_plan`.
    patience : float
        Seconds to wait while there is no worker.
    """

    client: Client
    memory: int
    stream: bool = False
    patience: float = 600.0

    def __call__(
        self,
        plan: Plan,
        outputs: Sequence[Output],
        ledger: Ledger,
        progress: Progress,
        note: Note | None,
    ) -> tuple[Found, list[dict[str, str]]]:
        """Let workers write and finish every tensor of every output."""
        with self._hired(plan, outputs) as name:
            hands = Hands(self.client, name, self.patience, note)
            return _Merge(plan, outputs, ledger, progress, hands).run(note)

    @contextmanager
    def _hired(self, plan: Plan, outputs: Sequence[Output]) -> Iterator[str]:
        """The name under which the workers know this merge."""
        check_versions(self.client)
        from mergebench.merge.many.crew import Crew, Order

        assert plan.recipe.out is not None
        out = str(Path(plan.recipe.out).expanduser().absolute())
        order = Order(
            replace(plan.recipe, out=out), str(Path.cwd()), self.memory, self.stream,
            marks_of(plan), tuple(output.staged for output in outputs),
        )  # fmt: skip
        name = f"mergebench-{secrets.token_hex(8)}"
        self.client.register_plugin(Crew(order), name=name)
        try:
            yield name
        finally:
            # A scheduler that has gone has forgotten it.
            with suppress(Exception):
                self.client.unregister_worker_plugin(name)


def check_inputs(plan: Plan) -> None:
    """Refuse inputs that other processes cannot open.

    Raises
    ------
    ParameterError
    """
    inputs = [*plan.models, *([] if plan.base is None else [plan.base])]
    for source in (*inputs, *(each.source for each in plan.collected)):
        if not source.identity:
            raise ParameterError(
                f"{source.label}: is held by this process, and workers open files",
                fix="save it and give its path, or merge without a cluster",
            )


def check_versions(client: Client) -> None:
    """Refuse workers with another mergebench, or without.

    Raises
    ------
    MergebenchError
    """
    found = client.get_versions(check=False, packages=["mergebench"])
    mine = own_version()
    others = {"the scheduler": found["scheduler"]} | {
        f"worker {address}": about for address, about in found["workers"].items()
    }
    for who, about in others.items():
        # What has just died does not answer.
        if not about:
            continue
        theirs = about["packages"].get("mergebench")
        if theirs != mine:
            raise MergebenchError(
                f"{who}: has another mergebench",
                got=theirs or "none",
                expected=mine,
                fix="install the same version there",
            )


@dataclass(eq=False)
class _Merge:
    """One merge, as its client sees it."""

    plan: Plan
    outputs: Sequence[Output]
    ledger: Ledger
    progress: Progress
    hands: Hands
    done: int = 0
    units: tuple[Unit, ...] = ()

    def run(self, note: Note | None) -> tuple[Found, list[dict[str, str]]]:
        plan = self.plan
        found = Found.nothing(plan)
        left = []
        self.units = units_of(plan)
        self.done = self.ledger.swept
        for unit in self.units:
            names = []
            for name in unit.names:
                if self.ledger.is_finished(targets_of(plan, name)):
                    found.add(name, earlier(self.ledger, len(self.outputs), name))
                    self._count("merging", [name])
                else:
                    names.append(name)
            if names:
                left.append(replace(unit, names=tuple(names)))
        digests = [dict(output.finished) for output in self.outputs]
        if left:
            with workers(plan.tiling.workers) as pool:
                evaluator = Evaluator(
                    plan.aligned.items, plan.tiling, pool, known=self.ledger.known,
                    fusing=fuses(plan), note=note, spread=self._spread,
                )  # fmt: skip
                measure_whole(plan, evaluator)
            self._merge(left, found, digests)
        return found, digests

    def _merge(self, left: Sequence[Unit], found: Found, digests: Sequence[dict[str, str]]) -> None:
        from mergebench.merge.many.crew import merge

        known = whole_only(self.ledger.known)
        jobs = ((unit, (unit.names, known)) for unit in left)
        merged: Merged
        for unit, merged in self.hands.each(jobs, merge):
            for name, outcome in merged.outcomes.items():
                found.add(name, outcome)
                record(self.ledger, name, outcome)
            for output, own, all_of in zip(self.outputs, merged.digests, digests, strict=True):
                for target, digest in own.items():
                    output.take(target, digest)
                    all_of[target] = digest
            self._count("merging", unit.names)

    def _spread(
        self, sweep: ItemSweep, scope: Scope, visit: Callable[[Stack, At], Any]
    ) -> Iterator[tuple[At, Any]]:
        """A sweep by the workers; by this process, where a visitor cannot be sent."""
        from mergebench.merge.many.crew import look_at

        if not _can_travel(visit):
            yield from sweep.here(visit)
            return
        known = whole_only(self.ledger.known)
        own = {item.site.name for item in sweep.items}
        jobs = []
        for unit in self.units:
            names = tuple(name for name in unit.names if name in own)
            if names:
                jobs.append((unit, (scope, names, visit, known)))
        for unit, looks in self.hands.each(jobs, look_at, ordered=True):
            yield from seen(sweep, looks)
            self._count("measuring", [name for name in unit.names if name in own])

    def _count(self, what: str, names: Iterable[str]) -> None:
        items = (self.plan.aligned.items.get(name) for name in names)
        self.done += sum(item.site.size for item in items if item is not None)
        total = self.plan.entries * self.plan.passes
        self.progress(what, min(self.done, total), total)


def _can_travel(visit: Any) -> bool:
    from distributed.protocol.pickle import dumps

    try:
        dumps(visit)
    except Exception:
        return False
    return True
