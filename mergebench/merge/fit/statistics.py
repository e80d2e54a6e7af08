"""Statistics of models that only data can tell, collected once and written to files.

What is written are ordinary safetensors files; merges read them tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergebench.checkpoints.placement import TensorSpec, plan_layout
from mergebench.checkpoints.writer import Output
from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.site import make_sites
from mergebench.core.tensor import Array, dtype_name
from mergebench.merge.collected import metadata
from mergebench.merge.fit.candidate import Candidate
from mergebench.merge.fit.fishers import Labels, fisher_of
from mergebench.merge.fit.grams import Inputs, grams_of
from mergebench.merge.fit.live import fill, names_in
from mergebench.merge.fit.memory import STATISTICS, advised
from mergebench.merge.fit.task import Task
from mergebench.merge.partition import selected
from mergebench.merge.plan import Plan

if TYPE_CHECKING:
    import torch

Tell = Callable[[str, int, int], None]
COLLECTING = "collecting statistics"


@dataclass(frozen=True)
class How:
    """How statistics are collected.

    Attributes
    ----------
    split : str
    batches : int or None
        Most batches of a task.
    labels : expected, sampled or true
        Of a Fisher; see :func:`~mergebench.merge.fit.fishers.fisher_of`.
    embeddings : bool
        Of Gram matrices: count the rows of embeddings too.
    include, exclude : tuple of str
        Selectors of the tensors that statistics are of, as of a merge; all by default. Merges
        average those that no file has.
    seed : int
    device : str
    """

    split: str = "val"
    batches: int | None = None
    labels: Labels = "expected"
    embeddings: bool = False
    seed: int = 0
    device: str = "cpu"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was collected of one model.

    Attributes
    ----------
    tensors : mapping of tensor name to float32 array
        By the names of the checkpoint.
    about : mapping
        What the file says of itself.
    """

    tensors: Mapping[str, Array]
    about: Mapping[str, Any] = field(default_factory=dict)


def collect(
    candidate: Candidate, kind: str, tasks: Sequence[Task], how: How, tell: Tell | None = None
) -> Statistics:
    """The Fisher or the Gram matrices of one model, on the data of some tasks.

    Parameters
    ----------
    candidate : Candidate
        Of the model as it is; an adapter with its base.
    kind : fisher or gram
    tasks : sequence of Task
        The first one's module is used for all.
    how : How
    tell : callable, optional
        Told ``(what, batches done, batches in all)``.

    Raises
    ------
    MergebenchError
        If a task has no data to be run through a model, nothing comes of them, or memory does not
        suffice.
    """
    with advised(how.device, COLLECTING, STATISTICS):
        return _collect(candidate, kind, tasks, how, tell)


def _collect(
    candidate: Candidate, kind: str, tasks: Sequence[Task], how: How, tell: Tell | None
) -> Statistics:
    wanted = wanted_in(candidate.plan, how)
    module, names = live(tasks[0], candidate.arrays())
    candidate.close()
    only = {own for own, name in names.items() if name in wanted}
    rows: dict[str, int] = {}
    if kind == "fisher":
        found, count = fisher_of(
            module, tasks, how.split, labels=how.labels, most=how.batches, seed=how.seed,
            device=how.device, tell=tell, only=only,
        )  # fmt: skip
        said: dict[str, Any] = {"examples": count, "labels": how.labels}
        if how.labels == "sampled":
            said["seed"] = how.seed
        tensors = {names[name]: each.numpy() for name, each in found.items()}
    else:
        inputs, count = grams_of(
            module, tasks, how.split, embeddings=how.embeddings, most=how.batches,
            device=how.device, tell=tell, only=only,
        )  # fmt: skip
        rows = {names[name]: each.rows for name, each in inputs.items()}
        tensors = means_of(inputs, names)
        said = {"batches": count, "rows": rows}
    return Statistics(
        narrow(tensors, candidate.label),
        {**described(kind, candidate.plan.models[0], tasks, how.split), **said},
    )


def wanted_in(plan: Plan, how: How) -> set[str]:
    """Names of the tensors that statistics are of, as far as options say.

    Raises
    ------
    ParameterError
        If a selector matches no tensor, or nothing is left.
    """
    aligned = plan.aligned
    shapes = {
        name: aligned.items[name].site.shape
        if name in aligned.items
        else tuple(aligned.copies[name].shape)
        for name in aligned.order
    }
    found = selected(make_sites(shapes), (), how.include, how.exclude, "--include", "--exclude")
    if not found:
        raise ParameterError(
            "--include and --exclude leave nothing to collect statistics of", fix="relax one"
        )
    return found


def means_of(inputs: dict[str, Inputs], names: Mapping[str, str]) -> dict[str, Array]:
    """``XᵀX`` per input in float32 by the checkpoint's names; what it is made of is given back."""
    found: dict[str, Array] = {}
    for name in list(inputs):
        # One at a time: the sums are twice as large as what is kept.
        found[names[name]] = inputs.pop(name).mean().float().numpy()
    return found


def live(task: Task, values: Mapping[str, Array]) -> tuple[torch.nn.Module, dict[str, str]]:
    """A task's module with some values, and the checkpoint's names of its tensors."""
    module = task.scorer.module()
    fill(module, values)
    return module, names_in(module, values)


def described(kind: str, model: Any, tasks: Sequence[Task], split: str) -> dict[str, Any]:
    """What every statistics file says: of what, and from what."""
    return {
        "kind": kind,
        "model": {"path": model.label, "fingerprint": model.fingerprint},
        "tasks": [{"name": task.name, "spec": task.spec} for task in tasks],
        "split": split,
    }


def narrow(tensors: Mapping[str, Array], label: str) -> dict[str, Array]:
    """The same in float32, if all of them fit.

    Raises
    ------
    MergebenchError
        For what is not finite, and if there is nothing at all.
    """
    if not tensors:
        raise MergebenchError(
            f"{label}: the data reach nothing that statistics could be collected of",
            fix="a task whose module has parameters, and linear layers for `gram`",
        )
    found = {}
    for name, each in tensors.items():
        with np.errstate(over="ignore"):
            found[name] = np.ascontiguousarray(each, np.float32)
        if not np.isfinite(found[name]).all():
            raise MergebenchError(
                f"{label}: the statistics of {name!r} are not finite",
                fix="look at the model: `mergebench inspect` lists NaN",
            )
    return found


def save(made: Statistics, out: Path, *, force: bool = False) -> int:
    """Write a statistics file, whole or not at all; its size in bytes.

    Raises
    ------
    MergebenchError
        If it may not be written there, or the system refuses.
    """
    specs = [TensorSpec(n, dtype_name(a.dtype), a.shape) for n, a in made.tensors.items()]
    layout = plan_layout(specs, "statistics", None, metadata=metadata(made.about))
    with Output(out, layout, single_file=True, force=force) as output:
        for name, array in made.tensors.items():
            output.write(name, 0, array)
            output.finish(name, "")
    return out.stat().st_size
