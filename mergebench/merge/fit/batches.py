"""Batches of any task: on a device, through a module, and example by example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from mergebench.core.errors import ParameterError
from mergebench.merge.fit.task import Learnable, Task

if TYPE_CHECKING:
    import torch


def check_learnable(task: Task, *more: str) -> None:
    """Refuse a task without a module and batches.

    Parameters
    ----------
    task : Task
    *more : str
        Further methods that it must have.

    Raises
    ------
    ParameterError
    """
    lacks = [name for name in more if not hasattr(task.scorer, name)]
    if lacks or not isinstance(task.scorer, Learnable):
        raise ParameterError(
            f"task {task.name}: has no data to be run through a model",
            got=type(task.scorer).__name__,
            expected=", ".join(["module()", "batches(split)", "loss(outputs, batch)",
                                *(f"{name}(outputs, batch)" for name in more)]),
            fix=instead_of(task),
        )  # fmt: skip


def instead_of(task: Task) -> str:
    """What can be done where a task lacks what is asked for, by its own word if it has one."""
    own = getattr(task.scorer, "instead", "")
    return str(own) or "a task such as classify:FILE.json, or one written in Python"


def batches_of(task: Task, split: str, most: int | None) -> list[Any]:
    """The first batches of a split.

    Raises
    ------
    ParameterError
        If there is none.
    """
    return checked_batches(task, split, islice(task.scorer.batches(split), most))


def checked_batches(task: Task, split: str, batches: Iterable[Any]) -> list[Any]:
    """Batches of a split as a list.

    Raises
    ------
    ParameterError
        If there is none.
    """
    if not (found := list(batches)):
        raise ParameterError(f"task {task.name}: split {split!r} is empty", fix="name another one")
    return found


def on(batch: Any, device: str) -> Any:
    """A batch with its tensors on a device."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: on(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(on(each, device) for each in batch)
    return batch


def outputs_of(task: Task, module: Any, batch: Any) -> Any:
    """What a module makes of a batch."""
    if hasattr(task.scorer, "forward"):
        return task.scorer.forward(module, batch)
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)


def examples_in(batch: Any) -> Iterator[Any]:
    """A batch in batches of one example, along the first dimension of all its tensors.

    Raises
    ------
    ParameterError
        If its tensors have no first dimension in common.
    """
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in _tensors(batch)}
    if sizes == {0}:
        yield batch
        return
    if len(sizes) != 1:
        raise ParameterError(
            "batches: the first dimension of every tensor must be that of examples",
            got=", ".join(map(str, sorted(sizes))),
        )
    (count,) = sizes
    for place in range(count):
        yield _at(batch, place)


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if hasattr(batch, "shape"):
        yield batch
        return
    parts: Sequence[Any] = ()
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, (tuple, list)):
        parts = batch
    for each in parts:
        yield from _tensors(each)


def _at(batch: Any, place: int) -> Any:
    if hasattr(batch, "shape"):
        return batch[place : place + 1]
    if isinstance(batch, Mapping):
        return {key: _at(value, place) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_at(each, place) for each in batch)
    return batch
