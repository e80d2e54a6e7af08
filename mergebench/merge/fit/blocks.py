"""The blocks (vector, tensor) that are worth learning, by their gradients at the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergebench.core.errors import ParameterError
from mergebench.merge.fit.forward import Forward, forward_of
from mergebench.merge.fit.learn import _generator
from mergebench.merge.fit.memory import advised
from mergebench.merge.fit.mixture import each_tensor
from mergebench.merge.fit.objectives import loss_of
from mergebench.merge.fit.settings import Settings
from mergebench.merge.fit.task import Task
from mergebench.merge.plan import Plan

if TYPE_CHECKING:
    import torch

Block = tuple[str, int]


def informative(
    plan: Plan,
    tasks: Sequence[Task],
    settings: Settings,
    split: str,
    *,
    most: int | None = None,
    budget: int | None = None,
    signs: Mapping[str, float] | None = None,
    device: str = "cpu",
) -> frozenset[Block]:
    """The blocks with the largest ``|∂L/∂λ_ij|`` at λ = 0 (arXiv:2407.02880, section 5.2).

    One pass over the split at the base; the task vectors are read one tensor at a time, and none
    is held.

    Parameters
    ----------
    plan : Plan
        As for :func:`~mergebench.merge.fit.mixture.load_mixture`.
    most : int, optional
        Vectors that are held of each tensor: the paper's b.
    budget : int, optional
        Bytes of vectors that are held: blocks of the largest gradient per byte come first. Ours.
    tasks, settings, split, signs, device
        As for :func:`~mergebench.merge.fit.learn.learn`.

    Returns
    -------
    frozenset of (tensor name, row of the model)

    Raises
    ------
    ParameterError
        If nothing fits into the budget.
    """
    with advised(device):
        forward = forward_of(plan, tasks, settings, split, device)
        gradients = _gradients(forward, settings, signs or {})
    found: list[tuple[float, int, Block]] = []
    for name, _, vectors in each_tensor(plan):
        if name not in gradients:
            continue
        rated = []
        for row, vector in enumerate(vectors):
            if vector is not None:
                size = abs(float(vector.to(forward.device).dot(gradients[name])))
                rated.append((size, vector.bytes, (name, row)))
        rated.sort(key=lambda each: (-each[0], each[2]))
        found += rated if most is None else rated[:most]
    if budget is None:
        return frozenset(block for _, _, block in found)
    chosen, left = [], budget
    for _, size, block in sorted(found, key=lambda each: (-each[0] / each[1], each[2])):
        if size <= left:
            chosen.append(block)
            left -= size
    if not chosen:
        least = min(size for _, size, _ in found) if found else 0
        raise ParameterError(
            "--budget: no block of a task vector fits",
            got=f"{budget} bytes",
            expected=f"at least {least}",
        )
    return frozenset(chosen)


def _gradients(
    forward: Forward, settings: Settings, signs: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """∂L/∂θ at the base by name, with the mean of each task's batches."""
    import torch

    for each in forward.parameters.values():
        each.requires_grad_(True)
    loss = loss_of(forward, settings, None)
    loss.begin()
    for place, batches in enumerate(forward.batches):
        factor = signs.get(forward.tasks[place].name, 1.0) / len(batches)
        for number in range(len(batches)):
            value = loss.of(place, number, 0.0, _generator(settings.seed, number, place, 2))
            if value.requires_grad:
                torch.autograd.backward(factor * value)
    return {n: p.grad for n, p in forward.parameters.items() if p.grad is not None}
