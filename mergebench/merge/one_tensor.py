"""Merging one tensor, tile by tile, into the sinks of every output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.machine import PAGE
from mergebench.compute.masking import moved
from mergebench.compute.rounding import round_to
from mergebench.core.tensor import DTYPES, Array, Tensor, size_of
from mergebench.merge.apart import place_of
from mergebench.merge.at import Stack
from mergebench.merge.averaged import Mean
from mergebench.merge.chains import needs_base
from mergebench.merge.core_space import fits, merged_item
from mergebench.merge.factors import write_factors
from mergebench.merge.item import Item, load_with_holes, located, opened, passed_through
from mergebench.merge.op import Chain
from mergebench.merge.outcome import Outcome
from mergebench.merge.plan import Plan
from mergebench.merge.runner import Room
from mergebench.merge.sinks import Sink, place_in
from mergebench.merge.stream import Evaluator
from mergebench.merge.variants import Variant


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
            _copy(plan, evaluator, name, target, sinks)
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
        places = [place_in(sink, targets[0]) for sink in sinks]
        for start, parts, some in pieces(plan, evaluator, item, places):
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


def pieces(
    plan: Plan, evaluator: Evaluator, item: Item, places: Sequence[int]
) -> Iterator[tuple[int, list[Array], bool]]:
    """``(first entry, one array per variant, any holes)`` of every job of a tensor, in order.

    The arrays are used again for what comes behind. They lie to pages of memory as they will to
    those of files, in which the tensor begins at ``places``, one per variant: see
    :mod:`mergebench.checkpoints.direct`.
    """
    dtype = plan.package.dtype_of(item.site.name)
    chains = [variant.at(item.site.name) for variant in plan.variants]
    cores = [in_core(evaluator, ops, item) for ops in chains]
    dense = [ops for ops, core in zip(chains, cores, strict=True) if core is None]
    unit, jobs = evaluator.pieces(dense, item)
    item = opened(item)
    fusible = len(dense) == len(chains) and evaluator.stores(dtype)
    fused = evaluator.fused(chains, item, unit, ends=True) if fusible else None

    size, spare = DTYPES[dtype].itemsize, evaluator.results

    def by_kernel(start: int, stop: int, outs: Sequence[Array]) -> bool:
        assert fused is not None
        wide, some = fused.tile(evaluator.tiling.tile, unit), False
        with Room(fused, wide, evaluator.read_into) as room:
            for begin in range(start, stop, wide):
                end = min(begin + wide, stop)
                parts = [out[begin - start : end - start] for out in outs]
                if not fused.merge(room.buffers, (begin, end), dtype, parts):
                    room.leave()
                    some |= by_ops(begin, end, parts)
        return some

    def by_ops(start: int, stop: int, outs: Sequence[Array]) -> bool:
        some = False
        for begin, end in evaluator.tiling.tiles(start, stop, unit):
            parts, holes = merged_tile(evaluator, plan.variants, item, begin, end, cores)
            some |= holes is not None
            for out, part in zip(outs, parts, strict=True):
                out[begin - start : end - start] = round_to(part, dtype, item.site.name)
                if holes is not None:
                    out[begin - start : end - start][holes] = np.nan
        return some

    work, name, ahead = by_ops if fused is None else by_kernel, item.site.name, evaluator.ahead

    def job(start: int, stop: int) -> tuple[int, list[Array], bool, list[NDArray[np.uint8]]]:
        length = (stop - start) * size
        skews = [(place + start * size) % PAGE // size * size for place in places]
        blocks = [spare.take(skew + length) for skew in skews]
        outs = [
            block[skew : skew + length].view(DTYPES[dtype])
            for block, skew in zip(blocks, skews, strict=True)
        ]
        return start, outs, work(start, stop, outs), blocks

    def coming() -> Iterator[Any]:
        for start, stop in jobs:
            ahead.comes(name, stop)
            yield partial(job, start, stop)

    for start, outs, some, blocks in evaluator.each_job(coming()):
        ahead.read(name, start, start + outs[0].size, last=True)
        yield start, outs, some
        for block in blocks:
            spare.give(block)


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


def _copy(plan: Plan, evaluator: Evaluator, name: str, target: str, sinks: Sequence[Sink]) -> None:
    if own := plan.aligned.own.get(name):
        for variant, sink in zip(plan.variants, sinks, strict=True):
            _copy_of(plan, evaluator, name, target, own[place_of(variant.tail)], [sink])
    else:
        _copy_of(plan, evaluator, name, target, plan.aligned.copies[name], sinks)


def _copy_of(
    plan: Plan,
    evaluator: Evaluator,
    name: str,
    target: str,
    tensor: Tensor,
    sinks: Sequence[Sink],
) -> None:
    size = size_of(tensor.shape)
    dtype = plan.layout.places[target].spec.dtype
    itemsize = DTYPES[dtype].itemsize
    stored, place = DTYPES[tensor.dtype].itemsize, place_in(sinks[0], target)
    for start in range(0, size, plan.tiling.job):
        stop = min(start + plan.tiling.job, size)
        evaluator.ahead.comes(name, stop)
        skew = (place + start * itemsize) % PAGE
        block = evaluator.results.take(skew + (stop - start) * stored)
        piece = np.ascontiguousarray(tensor.read(start, stop, block[skew:]))
        if dtype != tensor.dtype:
            wide = np.float64 if tensor.dtype == "F64" else np.float32
            piece = _converted(piece.astype(wide), dtype, name, plan.recipe.allow_nonfinite)
        for sink in sinks:
            sink.write(target, start * itemsize, piece)
        evaluator.results.give(block)


def _converted(values: Array, dtype: str, name: str, lenient: bool) -> Array:
    finite = np.isfinite(values)
    if not lenient or finite.all():
        return round_to(values, dtype, name)
    out = round_to(np.where(finite, values, 0), dtype, name)
    out[~finite] = values[~finite].astype(out.dtype)
    return out
