"""The engine: runs a plan, tile by tile, into whatever takes the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import xxhash

from mergebench.checkpoints.placement import TensorSpec
from mergebench.checkpoints.staging import check_destination
from mergebench.checkpoints.writer import Output, together
from mergebench.compute.masking import moved
from mergebench.compute.rounding import round_to
from mergebench.compute.threads import one_thread
from mergebench.core.tensor import DTYPES, Array, Tensor, size_of
from mergebench.manifest import MANIFEST, sealed, with_outputs
from mergebench.merge.ahead import Ahead, ahead_of, room_of
from mergebench.merge.apart import place_of
from mergebench.merge.averaged import Mean
from mergebench.merge.core_space import fits, merged_item
from mergebench.merge.factors import write_factors
from mergebench.merge.kernels import ready
from mergebench.merge.op import Chain, Stack, needs_base
from mergebench.merge.outcome import Found, Outcome, Written, earlier, record, written
from mergebench.merge.plan import Plan
from mergebench.merge.resume import Ledger, resume_key
from mergebench.merge.stream import (
    Evaluator,
    Item,
    load_with_holes,
    located,
    opened,
    passed_through,
)
from mergebench.merge.variants import Variant

#: ``(what is being done, entries done, entries in all)``.
Progress = Callable[[str, int, int], None]


class Sink(Protocol):
    """Takes the bytes of one output, each tensor from its first byte to its last."""

    def write(self, name: str, byte_start: int, data: Array) -> None:
        """Take the entries of a tensor from byte ``byte_start`` on."""
        ...

    def finish(self, name: str) -> None:
        """Take note that a tensor has all its bytes."""
        ...


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


class Memory:
    """A sink that keeps tensors as arrays."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.arrays = {spec.name: np.empty(spec.shape, DTYPES[spec.dtype]) for spec in specs}

    def write(self, name: str, byte_start: int, data: Array) -> None:
        """Copy entries into their place."""
        target = self.arrays[name].reshape(-1)
        begin = byte_start // target.itemsize
        target[begin : begin + data.size] = data.reshape(-1)

    def finish(self, name: str) -> None:
        """Nothing is left to do."""


@dataclass(eq=False)
class _Digests:
    """Hashes what passes through on its way to an output; what was there before stays."""

    output: Output
    states: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str, byte_start: int, data: Array) -> None:
        if name in self.output.finished:
            return
        state = self.states.setdefault(name, xxhash.xxh3_128())
        state.update(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self.output.write(name, byte_start, data)

    def finish(self, name: str) -> None:
        self.output.finish(name, self.digest(name))

    def digest(self, name: str) -> str:
        if name in self.output.finished:
            return self.output.finished[name]
        # An empty tensor has no bytes to pass through.
        return str(self.states.setdefault(name, xxhash.xxh3_128()).hexdigest())

    def digests(self) -> dict[str, str]:
        names = {*self.states, *self.output.finished}
        return {name: self.digest(name) for name in sorted(names)}


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
        # This thread writes: a large output waits for its disk, and the one worker need not.
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

    Returns
    -------
    list of Written, in the order of ``plan.variants``

    Raises
    ------
    MergebenchError
        For what only the data can show: NaN, overflow of the output dtype, a full disk; and if
        another run is writing one of the outputs.
    """
    outputs = outputs_of(plan, force=force)
    with together(outputs):
        ledger = Ledger(plan, outputs)
        if note is not None:
            for sentence in ledger.notes():
                note(sentence)
        show = progress or _unseen
        found, unsorted = (run or _run_here)(plan, outputs, ledger, show, note)
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


def outputs_of(plan: Plan, *, force: bool) -> list[Output]:
    """The outputs of a plan, not yet open; every variant must have a place."""
    found, lean = [], room_of(plan) is not None
    for variant in plan.variants:
        if variant.out is None:
            raise ValueError("a variant has no place to be written to")
        output = Output(
            variant.out,
            plan.package.layout_of(variant),
            single_file=plan.package.single_file,
            side=plan.package.sides(variant),
            force=force,
            key=resume_key(plan, variant),
            lean=lean,
        )
        found.append(output)
    return found


def _run_here(
    plan: Plan,
    outputs: Sequence[Output],
    ledger: Ledger,
    progress: Progress,
    note: Callable[[str], None] | None,
) -> tuple[Found, list[dict[str, str]]]:
    sinks = [_Digests(output) for output in outputs]
    with ahead_of(plan) as ahead:
        found = _run(plan, sinks, progress, ledger, ahead, note)
    return found, [sink.digests() for sink in sinks]


def execute_in_memory(plan: Plan, progress: Progress | None = None) -> list[dict[str, Array]]:
    """Run a plan and return its outputs as arrays, in the order of ``plan.variants``."""
    sinks = [Memory(plan.package.specs) for _ in plan.variants]
    execute_into(plan, sinks, progress)
    return [sink.arrays for sink in sinks]


def execute_into(plan: Plan, sinks: Sequence[Sink], progress: Progress | None = None) -> Found:
    """Run a plan into sinks, one for each of ``plan.variants``.

    Tensors are computed in the order of ``plan.aligned.order``, and none besides; what is measured
    over the whole model is measured over all of its items.
    """
    with ahead_of(plan) as ahead:
        return _run(plan, sinks, progress or _unseen, Ledger(plan), ahead)


def _run(
    plan: Plan,
    sinks: Sequence[Sink],
    progress: Progress,
    ledger: Ledger,
    ahead: Ahead,
    note: Callable[[str], None] | None = None,
) -> Found:
    total = plan.entries * plan.passes
    done = ledger.swept
    found = Found.nothing(plan)
    # A lane that waits for its device leaves the core to another.
    count = max(plan.tiling.workers, 1 if plan.device is None else 2)
    with workers(count, apart=ahead.large) as pool:

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


def merge_tensor(
    plan: Plan,
    evaluator: Evaluator,
    name: str,
    sinks: Sequence[Sink],
    merged: Callable[[int], None] = lambda entries: None,
) -> Outcome:
    """Merge or copy one tensor into every output, with its twins; nothing is finished.

    ``merged`` is told how many entries have been merged since it was called last.
    """
    targets = targets_of(plan, name)
    item = plan.aligned.items.get(name)
    residuals: list[float | None] = [None] * len(sinks)
    nonfinite: Mapping[str, int] = {}
    if item is None:
        for target in targets:
            _copy(plan, name, target, sinks, evaluator.ahead)
        tensor = plan.aligned.copies[name]
        nonfinite = tensor.nonfinite() if isinstance(tensor, Mean) else {}
    else:
        for variant in plan.variants:
            evaluator.prepare(variant.at(name), item)
    if item is not None and name in plan.package.modules:
        for index, (variant, sink) in enumerate(zip(plan.variants, sinks, strict=True)):
            residuals[index] = write_factors(plan, evaluator, variant, item, sink)
        merged(item.site.size)
    elif item is not None:
        holes = False
        for start, parts, some in _pieces(plan, evaluator, item):
            holes |= some
            for sink, part in zip(sinks, parts, strict=True):
                for target in targets:
                    sink.write(target, start * part.itemsize, part)
            merged(parts[0].size)
        nonfinite = passed_through(item) if holes else {}
    readings = tuple(evaluator.readings(variant.at(name), name) for variant in plan.variants)
    return Outcome(tuple(residuals), readings, nonfinite)


def targets_of(plan: Plan, name: str) -> list[str]:
    """Tensors of the output that one tensor of the plan gives."""
    if name in plan.package.modules:
        return [spec.name for spec in plan.package.modules[name].specs]
    return [plan.package.renamed.get(name, name), *plan.aligned.twins.get(name, ())]


def _pieces(
    plan: Plan, evaluator: Evaluator, item: Item
) -> Iterator[tuple[int, list[Array], bool]]:
    """``(first entry, one array per variant, any holes)`` of every job of a tensor, in order."""
    dtype = plan.package.dtype_of(item.site.name)
    chains = [variant.at(item.site.name) for variant in plan.variants]
    cores = [in_core(evaluator, ops, item) for ops in chains]
    dense = [ops for ops, core in zip(chains, cores, strict=True) if core is None]
    unit, jobs = evaluator.pieces(dense, item)
    item = opened(item)
    fusible = len(dense) == len(chains) and evaluator.stores(dtype)
    fused = evaluator.fused(chains, item, unit, ends=True) if fusible else None

    def by_kernel(start: int, stop: int) -> tuple[int, list[Array], bool]:
        assert fused is not None
        outs = [np.empty(stop - start, DTYPES[dtype]) for _ in plan.variants]
        wide = fused.tile(evaluator.tiling.tile, unit)
        room, some = fused.buffers(wide), False
        for begin in range(start, stop, wide):
            end = min(begin + wide, stop)
            parts = [out[begin - start : end - start] for out in outs]
            if not fused.merge(room, (begin, end), dtype, parts):
                _, found, holes = by_ops(begin, end)
                some |= holes
                for part, values in zip(parts, found, strict=True):
                    part[:] = values
        return start, outs, some

    def by_ops(start: int, stop: int) -> tuple[int, list[Array], bool]:
        outs = [np.empty(stop - start, DTYPES[dtype]) for _ in plan.variants]
        some = False
        for begin, end in evaluator.tiling.tiles(start, stop, unit):
            parts, holes = merged_tile(evaluator, plan.variants, item, begin, end, cores)
            some |= holes is not None
            for out, part in zip(outs, parts, strict=True):
                out[begin - start : end - start] = round_to(part, dtype, item.site.name)
                if holes is not None:
                    out[begin - start : end - start][holes] = np.nan
        return start, outs, some

    work, name, ahead = by_ops if fused is None else by_kernel, item.site.name, evaluator.ahead

    def coming() -> Iterator[Callable[[], tuple[int, list[Array], bool]]]:
        for start, stop in jobs:
            ahead.comes(name, start, stop)
            yield partial(work, start, stop)

    for start, outs, some in evaluator.each_job(coming()):
        ahead.read(name, start, start + outs[0].size, last=True)
        yield start, outs, some


def in_core(evaluator: Evaluator, ops: Chain, item: Item) -> Item | None:
    """The merged update of low-rank inputs, ready to be added; ``None`` where tiles are merged."""
    if not fits(ops, item):
        return None
    return merged_item(lambda at, stack: evaluator.run(ops, item, at, stack), ops, item)


def merged_tile(
    evaluator: Evaluator,
    variants: Sequence[Variant],
    item: Item,
    start: int,
    stop: int,
    ready: Sequence[Item | None],
) -> tuple[list[Array], Array | None]:
    """Entries ``start:stop`` of every variant, base added, not yet rounded, and its holes.

    Holes are where the result is to be NaN; until then it is what it would be without them.
    ``ready`` has, per variant, the merged update where it is known already.
    """
    if all(ready):
        stack, base, holes = np.empty((0, 0)), None, None
        at = item.at(start, stop)
    else:
        stack, base, holes = load_with_holes(item, start, stop)
        wanted = any(needs_base(variant.at(item.site.name)) for variant in variants)
        at = located(item, start, stop, base, wanted)
    memo: dict[Any, Stack] | None = {} if len(variants) > 1 else None
    found = []
    for variant, core in zip(variants, ready, strict=True):
        if core is not None:
            # Factors are finite, so that all the holes there are lie in the base.
            (merged,), base, holes = load_with_holes(core, start, stop)
        else:
            merged = evaluator.run(variant.at(item.site.name), item, at, stack, memo)[0]
        found.append(merged if base is None else moved(base, merged))
    return found, holes


def _copy(plan: Plan, name: str, target: str, sinks: Sequence[Sink], ahead: Ahead) -> None:
    if own := plan.aligned.own.get(name):
        for variant, sink in zip(plan.variants, sinks, strict=True):
            _copy_of(plan, name, target, own[place_of(variant.tail)], [sink], ahead)
    else:
        _copy_of(plan, name, target, plan.aligned.copies[name], sinks, ahead)


def _copy_of(
    plan: Plan, name: str, target: str, tensor: Tensor, sinks: Sequence[Sink], ahead: Ahead
) -> None:
    size = size_of(tensor.shape)
    dtype = plan.layout.places[target].spec.dtype
    itemsize = DTYPES[dtype].itemsize
    for start in range(0, size, plan.tiling.job):
        stop = min(start + plan.tiling.job, size)
        ahead.comes(name, start, stop)
        piece = np.ascontiguousarray(tensor.read(start, stop))
        if dtype != tensor.dtype:
            wide = np.float64 if tensor.dtype == "F64" else np.float32
            piece = _converted(piece.astype(wide), dtype, name, plan.recipe.allow_nonfinite)
        for sink in sinks:
            sink.write(target, start * itemsize, piece)


def _converted(values: Array, dtype: str, name: str, lenient: bool) -> Array:
    finite = np.isfinite(values)
    if not lenient or finite.all():
        return round_to(values, dtype, name)
    out = round_to(np.where(finite, values, 0), dtype, name)
    out[~finite] = values[~finite].astype(out.dtype)
    return out
