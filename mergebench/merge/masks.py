"""Results of several tasks in one file: one vector for all, and a mask and a scale for each."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import lcm, prod
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.adapters_zoo.kinds.tasks import MASKS, UNIFIED, tasks_metadata
from mergebench.adapters_zoo.masked import mask_bytes
from mergebench.checkpoints.destination import check_destination
from mergebench.checkpoints.placement import TensorSpec, plan_layout
from mergebench.checkpoints.writer import Output
from mergebench.compute.namespace import as_numpy
from mergebench.compute.threads import one_thread
from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.tensor import dtype_name
from mergebench.merge.apart import names_of
from mergebench.merge.chains import needs_base
from mergebench.merge.engine import Progress
from mergebench.merge.item import Item, load, located, opened
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.op import Chain, Op
from mergebench.merge.plan import Plan
from mergebench.merge.planning import make_plan
from mergebench.merge.stream import Evaluator
from mergebench.recipe import Recipe


@dataclass(frozen=True)
class Packed:
    """What was written.

    Attributes
    ----------
    tasks : tuple of str
    scales : tuple of float
        Of each task.
    shares : tuple of float
        The share of entries that its mask keeps.
    entries, bytes : int
        Entries of one task vector; size of the file.
    notes : tuple of str
    """

    tasks: tuple[str, ...]
    scales: tuple[float, ...]
    shares: tuple[float, ...]
    entries: int
    bytes: int
    notes: tuple[str, ...] = ()


def pack_tasks(
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Merge models by a method that masks one vector for each task, and write its parts.

    Parameters
    ----------
    recipe : Recipe
        As of a merge, with a chain such as that of ``emr`` or ``tall_masks``.
    out : Path
        A ``.safetensors`` file.
    force : bool
        Replace what is there.
    memory : int, bytes
    workers : int, optional
    progress : callable, optional

    Raises
    ------
    MergebenchError
        For anything the user can fix; then nothing is written.
    """
    if out.suffix != ".safetensors":
        raise ParameterError(f"{out}: all tasks are one file", fix="name it .safetensors with -o")
    for each in (*(ref.path for ref in recipe.models), recipe.base):
        if each is not None and out.resolve() == Path(each).expanduser().resolve():
            raise MergebenchError(f"{out}: would replace an input", fix="choose another name")
    check_destination(out, single_file=True, force=force)
    plan = make_plan(
        replace(recipe, form="delta", dtype="keep", out=None), memory=memory, workers=workers
    )
    ops, lam = _split(plan)
    sizes = {name: item.site.size for name, item in plan.aligned.items.items()}
    names = [name for name in plan.aligned.order if name in sizes]
    tasks = names_of([each.label for each in plan.models])
    with one_thread(), ThreadPoolExecutor(plan.tiling.workers) as pool:
        done, total = 0, sum(sizes.values()) * plan.passes

        def step(entries: int) -> None:
            nonlocal done
            done += entries
            if progress is not None:
                progress("merging", min(done, total), total)

        evaluator = Evaluator(plan.aligned.items, plan.tiling, pool, step)
        # Scales stand in the header, which is written first.
        scales = _scales(evaluator, ops, plan.aligned.items[names[0]], len(tasks))
        specs = _specs(plan, names, len(tasks))
        identity = None
        if plan.base is not None:
            identity = {"fingerprint": plan.base.fingerprint, "path": plan.base.label}
        metadata = tasks_metadata(tasks, scales, lam, names, identity)
        layout = plan_layout(specs, "tasks", None, metadata=metadata)
        kept = np.zeros(len(tasks), np.int64)
        with Output(out, layout, single_file=True, force=force) as output:
            for name in names:
                kept += _write(evaluator, ops, plan.aligned.items[name], output, step)
                for end in (UNIFIED, MASKS):
                    output.finish(name + end, "")
    entries = sum(sizes.values())
    shares = tuple(float(each) / max(entries, 1) for each in kept)
    return Packed(tasks, scales, shares, entries, out.stat().st_size, plan.notes)


def _split(plan: Plan) -> tuple[Chain, float]:
    """The chain up to the op that masks, and the scale behind it."""
    # Every variant ends with the choice of its task.
    ops = plan.variants[0].ops[:-1]
    at = next((k for k, each in enumerate(ops) if each.spec.masks is not None), None)
    asked = plan.recipe.method or "this chain"
    if at is None or any(each.name != "scale" for each in ops[at + 1 :]):
        raise ParameterError(
            f"{asked}: its results are not one vector under masks",
            fix="take emr or tall_masks, or end the chain with --then tall_mask",
        )
    chains = {each.ops[:-1] for each in plan.variants}
    if len(chains) > 1 or any(each.chains for each in plan.variants):
        raise ParameterError(
            f"{asked}: all tasks of a file have the same parameters",
            fix="give one value for each, for all tensors",
        )
    return ops[: at + 1], prod(float(dict(each.params)["lam"]) for each in ops[at + 1 :])


def _specs(plan: Plan, names: Sequence[str], tasks: int) -> list[TensorSpec]:
    found = []
    for name in names:
        item = plan.aligned.items[name]
        found.append(TensorSpec(name + UNIFIED, dtype_name(item.dtype), item.site.shape))
        found.append(TensorSpec(name + MASKS, "U8", (tasks, mask_bytes(item.site.size))))
    return found


def _value(evaluator: Evaluator, ops: Chain, item: Item) -> Any:
    """What the op that masks has measured over the model."""
    evaluator.prepare(ops, item)
    statistic = ops[-1].statistic
    return None if statistic is None else evaluator.known[ops, item.part]


def _scales(evaluator: Evaluator, ops: Chain, item: Item, tasks: int) -> tuple[float, ...]:
    known = _value(evaluator, ops, item)
    return (1.0,) * tasks if known is None else tuple(map(float, as_numpy(known)))


def _write(evaluator: Evaluator, ops: Chain, item: Item, output: Output, step: Any) -> Any:
    """Write one tensor; how many entries each mask keeps."""
    name, size = item.site.name, item.site.size
    masking: Op = ops[-1]
    assert masking.spec.masks is not None
    value = _value(evaluator, ops, item)
    unit, _ = evaluator.pieces([ops], item)
    # Bytes of masks are not shared between pieces.
    least = size if unit >= size else lcm(unit, 8)
    stride = max(evaluator.tiling.tile // max(least, 1), 1) * least
    ready, width = opened(item), mask_bytes(size)
    kept = np.zeros(len(item.deltas), np.int64)
    for start in range(0, size, max(stride, 1)):
        stop = min(start + stride, size)
        raw, base = load(ready, start, stop)
        at = located(ready, start, stop, base, needs_base(ops))
        stack = evaluator.run(ops[:-1], item, at, raw)
        here = at
        for each in ops[:-1]:
            here = here.after(each, at)
        here = replace(here, value=value, base=at.base, models=raw)
        shared, masks, _ = masking.spec.masks(stack, here, **dict(masking.params))
        if not np.isfinite(shared).all():
            raise MergebenchError(
                f"{name}: the merged task vector exceeds {item.dtype}",
                fix="store the inputs in float64",
            )
        output.write(name + UNIFIED, start * item.dtype.itemsize, np.ascontiguousarray(shared[0]))
        for row, mask in enumerate(np.asarray(masks)):
            bits = np.packbits(mask, bitorder="little")
            output.write(name + MASKS, row * width + start // 8, bits)
        kept += np.count_nonzero(masks, axis=1)
        step(stop - start)
    return kept
