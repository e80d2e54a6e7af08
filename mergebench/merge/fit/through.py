"""Inputs that come through blocks merged already: RegMean++ (arXiv:2508.03121, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mergebench.core.errors import ParameterError
from mergebench.core.tensor import Array
from mergebench.merge.fit.batches import batches_of, check_learnable, on
from mergebench.merge.fit.candidate import Candidate
from mergebench.merge.fit.grams import Inputs, check_grams, linear_weights, run, watched
from mergebench.merge.fit.memory import STATISTICS, advised
from mergebench.merge.fit.statistics import (
    COLLECTING,
    How,
    Statistics,
    described,
    live,
    means_of,
    narrow,
    wanted_in,
)
from mergebench.merge.fit.task import Task
from mergebench.merge.item import load
from mergebench.merge.op import OPS
from mergebench.merge.plan import Plan

if TYPE_CHECKING:
    import torch

Tell = Callable[[str, int, int], None]


class _EnoughError(Exception):
    """All that is watched has run; what follows is of no interest."""


def collect_through(
    candidate: Candidate,
    tasks: Sequence[Sequence[Task]],
    how: How,
    *,
    alpha: float,
    tell: Tell | None = None,
) -> list[Statistics]:
    """Gram matrices of every model, block by block, each block fed by the merged ones before it.

    Everything but linear layers is averaged first, the embeddings among it. Then, in the order in
    which data run through them, the inputs of each block's layers are collected in the block as
    every model has it, and the block is merged.

    Parameters
    ----------
    candidate : Candidate
        Of the plain mean (``linear``) of the models.
    tasks : sequence of sequences of Task
        Of each model, in the order of the recipe.
    how : How
    alpha : float
        Of the merge, which decides what later blocks get.
    tell : callable, optional
        Told ``(block, blocks done, blocks in all)``.

    Returns
    -------
    list of Statistics
        In the order of the recipe.

    Raises
    ------
    MergebenchError
        As :func:`~mergebench.merge.fit.statistics.collect`.
    """
    for task in (each for some in tasks for each in some):
        check_learnable(task)
    with advised(how.device, COLLECTING, STATISTICS):
        return _collect(candidate, tasks, how, alpha, tell)


def _collect(
    candidate: Candidate,
    tasks: Sequence[Sequence[Task]],
    how: How,
    alpha: float,
    tell: Tell | None,
) -> list[Statistics]:
    wanted = wanted_in(candidate.plan, how)
    plan, values = candidate.plan, dict(candidate.arrays())
    order = _places(plan, candidate)
    module, names = live(tasks[0][0], values)
    module.to(how.device).eval()
    tensors = module.state_dict(keep_vars=True)
    held = {names[name]: tensor for name, tensor in tensors.items()}
    weights = {e: name for e, name in linear_weights(module).items() if names[name] in wanted}
    check_grams(module, weights, len(plan.models))
    watch = {each: names[name] for each, name in weights.items()}
    work = [
        [(task, each) for task in tasks[place] for each in batches_of(task, how.split, how.batches)]
        for place in order
    ]
    stages, contiguous = _stages(plan, module, watch, work[0][0], how.device)
    found: list[dict[str, Inputs]] = [{} for _ in plan.models]
    op = OPS["gram_mean"](alpha=alpha, kind="gram_pp")
    for done, (key, members) in enumerate(stages, start=1):
        own = _of_stage(plan, key, members.values())
        stacks = {name: load(plan.aligned.items[name], 0, plan.aligned.items[name].site.size)[0]
                  for name in own}  # fmt: skip
        later = [m for _, more in stages[done:] for m in more] if contiguous else []
        for model, some in enumerate(work):
            _put(held, {name: stacks[name][model] for name in own})
            for task, batch in some:
                _run(task, module, on(batch, how.device), members, found[model], later)
        for name in own:
            item = plan.aligned.items[name]
            merged = values[name].reshape(-1)
            if any(name in each for each in found):
                at = replace(item.at(0, item.site.size), collected=_grams(name, found))
                merged = op.apply(stacks[name], at)[0]
            _put(held, {name: merged})
        if tell is not None:
            tell(key, done, len(stages))
    together = {
        "models": sorted(
            [source.fingerprint, repr(weight)]
            for source, weight in zip(plan.models, plan.weights, strict=True)
        ),
        "params": {"alpha": alpha},
    }
    made: dict[int, Statistics] = {}
    for place, source, inputs in zip(order, plan.models, found, strict=True):
        about = described("gram_pp", source, tasks[place], how.split)
        about |= {"rows": {name: each.rows for name, each in inputs.items()}, "merge": together}
        arrays = means_of(inputs, {name: name for name in inputs})
        made[place] = Statistics(narrow(arrays, source.label), about)
    return [made[place] for place in range(len(made))]


def _places(plan: Plan, candidate: Candidate) -> list[int]:
    """For every model of a plan, its place in the recipe that was asked for."""
    left = list(enumerate(each.path for each in candidate.recipe.models))
    found = []
    for model in plan.models:
        at = next(index for index, (_, path) in enumerate(left) if path == model.label)
        found.append(left.pop(at)[0])
    return found


def _grams(name: str, found: Sequence[dict[str, Inputs]]) -> Array:
    """Of every model, as a file holds them; zeros where its data do not come by."""
    import torch

    some = next(each[name] for each in found if name in each)
    assert some.gram is not None
    for each in found:
        each.setdefault(name, Inputs(torch.zeros_like(some.gram)))
    return np.stack([each[name].mean().float().double().numpy() for each in found])


def _key(plan: Plan, name: str) -> str:
    """The block that a tensor belongs to; its module where it is in none."""
    site = plan.aligned.items[name].site
    return name.rpartition(".")[0] if site.block is None else f"{site.stack}.{site.block}."


def _of_stage(plan: Plan, key: str, weights: Any) -> list[str]:
    """All that is merged of a block, or of a module."""
    wanted = set(weights)
    return [name for name in plan.aligned.items if name in wanted or _key(plan, name) == key]


def _stages(
    plan: Plan, module: Any, watch: Mapping[Any, str], first: tuple[Task, Any], device: str
) -> tuple[list[tuple[str, dict[Any, str]]], bool]:
    """Blocks in the order in which they run, and whether none runs again after a later one."""
    calls: list[str] = []
    merged = {each: name for each, name in watch.items() if name in plan.aligned.items}
    if not merged:
        raise ParameterError("no linear layer of the task's model is merged")
    task, batch = first
    with watched(merged, {}, lambda each: calls.append(_key(plan, merged[each]))) as now:
        run(task, module, on(batch, device), now)
    order = list(dict.fromkeys(calls))
    runs = [key for place, key in enumerate(calls) if place == 0 or calls[place - 1] != key]
    stages = [(key, {m: n for m, n in merged.items() if _key(plan, n) == key}) for key in order]
    return stages, len(runs) == len(order)


def _put(held: Mapping[str, torch.Tensor], values: Mapping[str, Array]) -> None:
    import torch

    with torch.no_grad():
        for name, value in values.items():
            if name in held:
                made = torch.from_numpy(np.ascontiguousarray(value, np.float32))
                held[name].copy_(made.reshape(held[name].shape))


def _run(
    task: Task,
    module: Any,
    batch: Any,
    members: Mapping[Any, str],
    found: dict[str, Inputs],
    later: Sequence[Any],
) -> None:
    """Run a batch as far as the first layer behind those that are watched."""

    def stop(each: Any, args: Any) -> None:
        raise _EnoughError

    hooks = [each.register_forward_pre_hook(stop) for each in later]
    try:
        with watched(members, found) as now:
            run(task, module, batch, now)
    except _EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
