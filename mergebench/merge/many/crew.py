"""What a worker of a Dask cluster holds while it takes part in a merge."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

from mergebench.checkpoints.placed import Staged
from mergebench.checkpoints.placement import Layout
from mergebench.core.errors import MergebenchError
from mergebench.merge.at import At, Stack
from mergebench.merge.engine import fuses, workers
from mergebench.merge.many.agree import Marks, check_alike, marks_of
from mergebench.merge.many.labour import Look, Merged, look, merge_unit
from mergebench.merge.op import Chain
from mergebench.merge.plan import Plan
from mergebench.merge.planning import make_plan
from mergebench.merge.stream import Evaluator
from mergebench.merge.sweep import Scope
from mergebench.recipe import Recipe

Known = Mapping[tuple[Chain, str], Any]


@dataclass(frozen=True)
class Order:
    """A merge, as far as workers must know it.

    Attributes
    ----------
    recipe : Recipe
        With an absolute place for the output.
    folder : str
        In which the client stands, and relative paths of inputs begin.
    memory : int, bytes
        Of each process.
    stream : bool
        As in :func:`make_plan`.
    marks : Marks
        Of the client's plan.
    staged : tuple of Staged
        Where the outputs are being made.
    """

    recipe: Recipe
    folder: str
    memory: int
    stream: bool
    marks: Marks
    staged: tuple[Staged, ...]


@dataclass(frozen=True)
class Refusal:
    """Why a unit could not be done.

    Attributes
    ----------
    error : MergebenchError
    outside : bool
        Whether the same command may succeed another time, as after a read error.
    """

    error: MergebenchError
    outside: bool


@dataclass(frozen=True)
class _Made:
    plan: Plan
    pool: Executor
    places: tuple[tuple[Staged, Layout], ...]

    def evaluator(self, known: Known) -> Evaluator:
        plan = self.plan
        return Evaluator(
            plan.aligned.items, plan.tiling, self.pool, known=dict(known), fusing=fuses(plan)
        )


class Crew(WorkerPlugin):  # type: ignore[misc]
    """One merge on one worker: its plan, made from the recipe and compared with the client's.

    A process does one unit at a time, with as many threads as Dask has given it, so that its
    memory is that of a merge.
    """

    def __init__(self, order: Order) -> None:
        self.order = order

    def setup(self, worker: Worker) -> None:
        """Called by Dask on the worker, also on one that joins later."""
        self._who = f"worker {worker.address}"
        self._threads = max(worker.state.nthreads, 1)
        self._turn = threading.Lock()
        self._made: _Made | None = None
        self._open = ExitStack()

    def teardown(self, worker: Worker) -> None:
        """Called by Dask when the merge or the worker ends."""
        del worker
        self._open.close()

    def do(self, work: Callable[[_Made], Any]) -> Any:
        """Run a piece of work, alone in this process; what a user can mend comes as a value."""
        with self._turn:
            try:
                return work(self._ready())
            except MergebenchError as error:
                return Refusal(error, isinstance(error.__cause__, OSError))

    def _ready(self) -> _Made:
        if self._made is None:
            plan = self._plan()
            check_alike(marks_of(plan), self.order.marks, self._who, str(self.order.recipe.out))
            layouts = [plan.package.layout_of(variant) for variant in plan.variants]
            pool = self._open.enter_context(workers(plan.tiling.workers))
            places = tuple(zip(self.order.staged, layouts, strict=True))
            self._made = _Made(plan, pool, places)
        return self._made

    def _plan(self) -> Plan:
        order = self.order
        try:
            return make_plan(
                order.recipe, memory=order.memory, workers=self._threads, stream=order.stream
            )
        except MergebenchError as error:
            here = Path.cwd()
            elsewhere = str(here) != order.folder
            raise MergebenchError(
                f"{self._who}: cannot plan the merge: {error}",
                fix="give absolute paths that all machines share"
                + (f"; the worker stands in {here}" if elsewhere else ""),
            ) from error


def look_at(
    name: str, scope: Scope, names: tuple[str, ...], visit: Callable[[Stack, At], Any], known: Known
) -> list[Look] | Refusal:
    """On a worker: :func:`look` at some tensors, after the ops that come before."""
    found: list[Look] | Refusal = _crew(name).do(
        lambda made: look(made.evaluator(known).sweep(scope, names), visit)
    )
    return found


def merge(name: str, names: tuple[str, ...], known: Known) -> Merged | Refusal:
    """On a worker: :func:`merge_unit`."""
    found: Merged | Refusal = _crew(name).do(
        lambda made: merge_unit(made.plan, made.evaluator(known), names, made.places)
    )
    return found


def _crew(name: str) -> Crew:
    crew = get_worker().plugins[name]
    assert isinstance(crew, Crew)
    return crew
