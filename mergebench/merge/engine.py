"""The engine: runs a plan, tile by tile, into whatever takes the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from mergebench.checkpoints import direct, page_cache
from mergebench.checkpoints.destination import check_destination
from mergebench.checkpoints.together import together
from mergebench.checkpoints.writer import Output
from mergebench.compute.threads import one_thread
from mergebench.core.tensor import Array
from mergebench.manifest import MANIFEST, sealed, with_outputs
from mergebench.merge.ahead import Ahead, ahead_of, room_of
from mergebench.merge.kernels import ready
from mergebench.merge.one_tensor import merge_tensor, targets_of
from mergebench.merge.outcome import Found, Written, earlier, record, written
from mergebench.merge.plan import Plan
from mergebench.merge.resume import Ledger, resume_key
from mergebench.merge.shared import Shared
from mergebench.merge.sinks import Digests, Memory, Sink
from mergebench.merge.stream import Evaluator

#: ``(what is being done, entries done, entries in all)``.
Progress = Callable[[str, int, int], None]


class Run(Protocol):
    """A way to fill the outputs of a plan: on this machine, or on many."""

    def __call__(
        self,
        plan: Plan,
        outputs: Sequence[Output],
        ledger: Ledger,
        progress: Progress,
        note: Callable[[str], None] | None,
    ) -> tuple[Found, list[dict[str, str]]]:
        """Write and finish every tensor of every output.

        Returns
        -------
        (Found, digests)
            The latter per output: tensor name -> xxh3-128 of the stored bytes.
        """
        ...


class _Here(Executor):
    """Runs a job when it is submitted: for one worker, where a thread would only cost time."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@contextmanager
def workers(count: int, *, apart: bool = False) -> Iterator[Executor]:
    """Threads for an evaluator; ``apart`` from this one, even if there is only one."""
    # Every worker computes on one core; a BLAS with threads of its own would fight them.
    with one_thread():
        if count == 1 and not apart:
            yield _Here()
            return
        with ThreadPoolExecutor(count, thread_name_prefix="mergebench") as pool:
            yield pool


def check_outputs(plan: Plan, *, force: bool = False) -> None:
    """Refuse places that may not be written to, before any work.

    Raises
    ------
    MergebenchError
        If an output exists without ``force``, or is something that must not be replaced.
    """
    for variant in plan.variants:
        if variant.out is not None:
            check_destination(
                variant.out,
                single_file=plan.package.single_file,
                force=force,
                key=resume_key(plan, variant),
            )


def execute(
    plan: Plan,
    *,
    force: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    run: Run | None = None,
    shared: Shared | None = None,
) -> list[Written]:
    """Run a plan and write its outputs, all of them in one reading of the inputs.

    A run that was killed or interrupted is continued by the next one with an equal plan.

    Parameters
    ----------
    plan : Plan
        Every variant must have a place.
    force : bool, default False
        Replace existing outputs.
    progress : callable, optional
        Called from this thread.
    note : callable, optional
        Called with sentences about work of an earlier run that is continued or thrown away.
    run : callable, optional
        How the outputs are filled; by the threads of this process if it is not given.
    shared : Shared, optional
        What other merges of the same inputs have measured; what this one measures is added.

    Returns
    -------
    list of Written, in the order of ``plan.variants``

    Raises
    ------
    MergebenchError
        For what only the data can show: NaN, overflow of the output dtype, a full disk; and if
        another run is writing one of the outputs.
    """
    room = room_of(plan)
    outputs = outputs_of(plan, force=force, room=room, past=run is None)
    with together(outputs):
        ledger = Ledger(plan, outputs, shared)
        if note is not None:
            for sentence in ledger.notes():
                note(sentence)
        show = progress or _unseen
        fill = run or partial(_run_here, room=room)
        found, unsorted = fill(plan, outputs, ledger, show, note)
        digests = [dict(sorted(each.items())) for each in unsorted]
        for variant, output, own in zip(plan.variants, outputs, digests, strict=True):
            if plan.package.single_file:
                output.fill(sealed(output.layout, own))
                continue
            about = plan.package.manifest_of(variant)
            output.add_side(MANIFEST, with_outputs(about, own, output.layout, output.beside))
    return written(plan, found, digests)


def _unseen(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def outputs_of(plan: Plan, *, force: bool, room: int | None, past: bool = False) -> list[Output]:
    """The outputs of a plan, not yet open; every variant must have a place.

    ``room`` is that of :func:`mergebench.merge.ahead.room_of`. With ``past`` large ones are written
    past the page cache, unless the user has asked for something to stay there.
    """
    found = []
    for variant in plan.variants:
        if variant.out is None:
            raise ValueError("a variant has no place to be written to")
        layout = plan.package.layout_of(variant)
        large = layout.total_bytes >= direct.LARGE and not page_cache.asked()
        output = Output(
            variant.out,
            layout,
            single_file=plan.package.single_file,
            side=plan.package.sides(variant),
            force=force,
            key=resume_key(plan, variant),
            lean=room is not None,
            direct=past and (room is not None or large),
        )
        found.append(output)
    return found


def _run_here(
    plan: Plan,
    outputs: Sequence[Output],
    ledger: Ledger,
    progress: Progress,
    note: Callable[[str], None] | None,
    room: int | None,
) -> tuple[Found, list[dict[str, str]]]:
    sinks = [Digests(output) for output in outputs]
    with ahead_of(plan, room) as ahead:
        # This thread writes: a large output waits for its disk, and the one worker need not.
        apart = ahead.large or any(output.waits for output in outputs)
        found = _run(plan, sinks, progress, ledger, ahead, note, apart=apart)
    return found, [sink.digests() for sink in sinks]


def execute_in_memory(
    plan: Plan, progress: Progress | None = None, shared: Shared | None = None
) -> list[dict[str, Array]]:
    """Run a plan and return its outputs as arrays, in the order of ``plan.variants``."""
    sinks = [Memory(plan.package.specs) for _ in plan.variants]
    execute_into(plan, sinks, progress, shared)
    return [sink.arrays for sink in sinks]


def execute_into(
    plan: Plan,
    sinks: Sequence[Sink],
    progress: Progress | None = None,
    shared: Shared | None = None,
) -> Found:
    """Run a plan into sinks, one for each of ``plan.variants``.

    Tensors are computed in the order of ``plan.aligned.order``, and none besides; what is measured
    over the whole model is measured over all of its items.
    """
    with ahead_of(plan, room_of(plan)) as ahead:
        ledger = Ledger(plan, (), shared)
        return _run(plan, sinks, progress or _unseen, ledger, ahead, apart=ahead.large)


def _run(
    plan: Plan,
    sinks: Sequence[Sink],
    progress: Progress,
    ledger: Ledger,
    ahead: Ahead,
    note: Callable[[str], None] | None = None,
    *,
    apart: bool,
) -> Found:
    total = plan.entries * plan.passes
    done = ledger.swept
    found = Found.nothing(plan)
    # A lane that waits for its device leaves the core to another.
    count = max(plan.tiling.workers, 1 if plan.device is None else 2)
    with workers(count, apart=apart) as pool:

        def swept(entries: int) -> None:
            nonlocal done
            done += entries
            progress("measuring", min(done, total), total)

        def merged(entries: int) -> None:
            nonlocal done
            done += entries
            progress("merging", min(done, total), total)

        evaluator = Evaluator(
            plan.aligned.items, plan.tiling, pool, swept, ledger.known, fusing=fuses(plan),
            note=note, ahead=ahead, device=plan.device,
        )  # fmt: skip
        for name in plan.aligned.order:
            targets = targets_of(plan, name)
            if ledger.is_finished(targets):
                found.add(name, earlier(ledger, len(sinks), name))
                item = plan.aligned.items.get(name)
                done += 0 if item is None else item.site.size
                continue
            outcome = merge_tensor(plan, evaluator, name, sinks, merged)
            found.add(name, outcome)
            record(ledger, name, outcome)
            for sink in sinks:
                for target in targets:
                    sink.finish(target)
            evaluator.forget(name)
            ahead.finished(name)
            merged(0)
    return found


def fuses(plan: Plan) -> bool:
    """Whether a merge is to use kernels where it can."""
    return ready.wanted(plan.entries * plan.passes * len(plan.models))
