"""One module that runs every task's batches, on any device and in any precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergebench.core.errors import ParameterError
from mergebench.core.tensor import Tensor, size_of
from mergebench.merge.api import to_torch
from mergebench.merge.device.choose import torch_device
from mergebench.merge.fit.batches import (
    batches_of,
    checked_batches,
    instead_of,
    on,
    outputs_of,
)
from mergebench.merge.fit.live import names_in
from mergebench.merge.fit.settings import Settings
from mergebench.merge.fit.task import Classifies, FewShot, Learnable, Task
from mergebench.merge.plan import Plan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Forward:
    """Tasks with their batches, and the module that they share.

    Attributes
    ----------
    module : torch module
        With the base's values, nothing in it learning.
    parameters : mapping of tensor name in the checkpoint to torch parameter
        Of the tensors that the plan merges.
    tasks : tuple of Task
    batches : tuple of list
        One list per task.
    device : str
    precision : str
    """

    module: Any
    parameters: Mapping[str, torch.nn.Parameter]
    tasks: tuple[Task, ...]
    batches: tuple[list[Any], ...]
    device: str
    precision: str

    def outputs(self, place: int, batch: Any) -> tuple[Any, Any]:
        """What the module returns for a batch of a task, and the batch where the module is."""
        batch = on(batch, self.device)
        return outputs_of(self.tasks[place], self.module, batch), batch

    def logits(self, place: int, batch: Any) -> torch.Tensor:
        """(examples, classes) in float32."""
        with self.cast():
            outputs, batch = self.outputs(place, batch)
            found: torch.Tensor = self.tasks[place].scorer.logits(outputs, batch)
        return found.float()

    def cast(self) -> AbstractContextManager[Any]:
        """Within it, products are taken in the precision asked for."""
        import torch

        kind, dtype = self.device.partition(":")[0], getattr(torch, self.precision)
        return torch.autocast(kind, dtype, enabled=self.precision != "float32")


def forward_of(
    plan: Plan, tasks: Sequence[Task], settings: Settings, split: str, device: str
) -> Forward:
    """The first task's module with the base's values, and the batches of a split.

    Raises
    ------
    ParameterError
        If a task cannot be learned from, the device is not there, a split is empty, or the module
        has no parameter that the plan merges.
    MismatchError
        If the checkpoint has nothing for a tensor of the module.
    """
    for task in tasks:
        check(task, settings)
    device = torch_device(device)
    module = tasks[0].scorer.module().to(device)
    module.eval()
    module.requires_grad_(False)
    names = names_in(module, plan.aligned.order)
    _fill(module, names, plan)
    held = dict(module.named_parameters())
    parameters = {names[n]: p for n, p in held.items() if names[n] in plan.aligned.items}
    if not parameters:
        raise ParameterError("the task's model has no parameter that a task vector moves")
    return Forward(
        module,
        parameters,
        tuple(tasks),
        tuple(_batches(task, settings, split) for task in tasks),
        device,
        settings.precision,
    )


def check(task: Task, settings: Settings) -> None:
    """Refuse a task that has not what an objective asks for.

    Raises
    ------
    ParameterError
    """
    classes = settings.objective != "labels"
    wanted: Any = Classifies if classes else Learnable
    if not isinstance(task.scorer, wanted):
        raise ParameterError(
            f"task {task.name}: cannot be learned from",
            got=type(task.scorer).__name__,
            expected="module(), batches(split), loss(outputs, batch)"
            + (" and logits(outputs, batch)" if classes else ""),
            fix=instead_of(task),
        )
    if settings.shots is not None and not isinstance(task.scorer, FewShot):
        raise ParameterError(
            f"task {task.name}: cannot be learned from a few examples of each class",
            got=type(task.scorer).__name__,
            expected="few(split, shots, seed)",
            fix="a task such as classify:FILE.json, or leave out --shots",
        )


def _fill(module: Any, names: Mapping[str, str], plan: Plan) -> None:
    """Give the module the base's values, those that no vector moves too."""
    import torch

    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            known = names[name]
            item = plan.aligned.items.get(known)
            stored: Tensor | None = plan.aligned.copies.get(known) if item is None else item.base
            if stored is None:
                continue
            values = to_torch({"": stored.read(0, size_of(stored.shape))})[""]
            tensor.copy_(values.reshape(tensor.shape))


def _batches(task: Task, settings: Settings, split: str) -> list[Any]:
    if settings.shots is None:
        return batches_of(task, split, None)
    return checked_batches(task, split, task.scorer.few(split, settings.shots, settings.seed))


def rows_of(batch: Any, count: int, rows: torch.Tensor) -> Any:
    """Some examples of a batch of ``count``: those rows of every tensor that has a row for each."""
    if hasattr(batch, "shape"):
        return batch[rows] if len(batch.shape) and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return {key: rows_of(value, count, rows) for key, value in batch.items()}
    return (
        type(batch)(rows_of(each, count, rows) for each in batch)
        if isinstance(batch, (tuple, list))
        else batch
    )
