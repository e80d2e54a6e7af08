"""Skill grafting with a mask that is learned (arXiv:2302.06600, section 2).

``θ = θ0 + γ ⊙ τ`` with ``γ = b + (1 - 2b) σ(S - 10)``: b are the entries of largest magnitude, S
starts uniform in [0, 1), so that γ is almost b, and every entry of S moves its own entry of γ from
what b says to the opposite. What is kept is γ rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.tensor import Array, read_all, size_of
from mergebench.merge.fit.batches import batches_of, check_learnable, on, outputs_of
from mergebench.merge.fit.candidate import Candidate
from mergebench.merge.fit.live import fill, names_in
from mergebench.merge.fit.memory import GRAFT, advised, check_fits
from mergebench.merge.fit.task import Task
from mergebench.merge.plan import Plan
from mergebench.merge.sparse import Sparse
from mergebench.recipe import Recipe

if TYPE_CHECKING:
    import torch

Tell = Callable[[str, int, int], None]
_BIAS = 10.0


@dataclass(frozen=True)
class Settings:
    """How a mask is learned.

    Attributes
    ----------
    density : float in (0, 1]
        Share of the entries that the mask starts with.
    epochs : int
        Passes over the batches; the authors' script has 10, their README 100.
    rate : float
        Of plain gradient descent; as large as published, since at the start γ moves by 5e-5 of S.
    l1 : float
        Added to the loss: l1 · Σγ, which favours few entries.
    seed : int
        Of S, and of the order of batches.
    """

    density: float = 1e-4
    epochs: int = 10
    rate: float = 1e7
    l1: float = 0.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Grafted:
    """A learned mask.

    Attributes
    ----------
    sparse : Sparse
        The entries of the task vector that the mask keeps.
    history : tuple of (float, int)
        Mean loss with the rounded mask and how many entries it has: at the start, and after every
        epoch.
    best : int
        Which of these is kept: the first of least loss.
    overlap : float
        Share of the smaller mask of start and result that the other has too.
    """

    sparse: Sparse
    history: tuple[tuple[float, int], ...] = field(default_factory=tuple)
    best: int = 0
    overlap: float = 1.0


@dataclass(eq=False)
class _Tensor:
    """One tensor under a mask."""

    parameter: torch.nn.Parameter
    start: torch.Tensor
    moved: torch.Tensor
    first: torch.Tensor
    logits: torch.Tensor

    def gates(self) -> torch.Tensor:
        """γ, between 0 and 1."""
        away = (self.logits - _BIAS).sigmoid()
        return self.first + (1 - 2 * self.first) * away

    def put(self, gates: torch.Tensor) -> None:
        """Let the module have ``θ0 + γ ⊙ τ``."""
        self.parameter.data.copy_(self.start + gates * self.moved)

    def step(self, rate: float, l1: float) -> None:
        """Descend along ``∂L/∂S = (∂L/∂θ ⊙ τ + l1) ⊙ (1 - 2b) ⊙ σ(1 - σ)``."""
        if self.parameter.grad is None:
            return
        away = (self.logits - _BIAS).sigmoid()
        slope = self.parameter.grad.to(self.moved.dtype) * self.moved + l1
        self.logits.sub_(slope * (1 - 2 * self.first) * away * (1 - away), alpha=rate)


def graft(
    recipe: Recipe,
    tasks: Sequence[Task],
    settings: Settings,
    split: str,
    *,
    make: Callable[[Recipe, str], Candidate],
    tell: Tell | None = None,
    device: str = "cpu",
) -> Grafted:
    """Learn which entries of one task vector carry a task.

    Parameters
    ----------
    recipe : Recipe
        One model and its base; ``include`` and ``exclude`` say which tensors may be grafted, the
        others are the base's.
    tasks : sequence of Task
        Each with ``module``, ``batches`` and ``loss``; the first one's module is used for all.
    settings : Settings
    split : str
        Whose batches are learned from, and whose loss chooses the epoch.
    make : callable ``(recipe, label) -> Candidate``
    tell : callable, optional
        Told ``(what, steps done, steps in all)``.
    device : str

    Raises
    ------
    ParameterError
        If a task cannot be learned from, or shares no parameter with the task vector.
    MergebenchError
        If a loss is not finite, or memory does not suffice.
    """
    for task in tasks:
        check_learnable(task)
    with advised(device, "grafting", GRAFT):
        return _graft(recipe, tasks, settings, split, make, tell, device)


def _graft(
    recipe: Recipe,
    tasks: Sequence[Task],
    settings: Settings,
    split: str,
    make: Callable[[Recipe, str], Candidate],
    tell: Tell | None,
    device: str,
) -> Grafted:
    import torch

    _check_room(recipe, make, device)
    work = [(task, batch) for task in tasks for batch in batches_of(task, split, None)]
    module = tasks[0].scorer.module()
    tau = _task_vector(recipe, "task_arithmetic", {"lam": 1.0}, make)
    kept_first = _task_vector(recipe, "graft", {"density": settings.density}, make)
    first = {name: values != 0 for name, values in kept_first.items()}
    del kept_first
    with make(replace(recipe, method="task_arithmetic", params={"lam": 0.0}), "the base") as under:
        plan, values = under.plan, under.arrays()
        fill(module, values)
        names = names_in(module, values)
    module.to(device).eval()
    module.requires_grad_(False)
    tensors = _tensors(module, names, plan, tau, first, settings.seed, device)
    random = torch.Generator().manual_seed(settings.seed)
    history, kept = [_rounded(tensors, module, work, device)], _masks(tensors)
    start, best, total = kept, 0, settings.epochs * len(work)
    for epoch in range(settings.epochs):
        for turn, place in enumerate(torch.randperm(len(work), generator=random).tolist()):
            task, batch = work[place]
            _learn(tensors, task, module, on(batch, device), settings)
            if tell is not None:
                tell(f"epoch {epoch + 1}", epoch * len(work) + turn + 1, total)
        history.append(_rounded(tensors, module, work, device))
        if history[-1][0] < history[best][0]:
            best, kept = len(history) - 1, _masks(tensors)
    return Grafted(_sparse(plan, tau, kept), tuple(history), best, _overlap(start, kept))


def fixed(recipe: Recipe, make: Callable[[Recipe, str], Candidate]) -> tuple[str, ...]:
    """Selectors of what the paper leaves as it is: embeddings and heads, where there are any."""
    with make(recipe, "the model") as candidate:
        kinds = {item.site.kind for item in candidate.plan.aligned.items.values()}
    return tuple(f"class={kind}" for kind in ("embedding", "head") if kind in kinds)


def _check_room(recipe: Recipe, make: Callable[[Recipe, str], Candidate], device: str) -> None:
    """Refuse what cannot fit, from headers alone.

    In float32 the module has its values; what is grafted also has base, task vector, mask and
    logits, its gradient, and γ while it is made.
    """
    aligned = make(replace(recipe, method="task_arithmetic", params={"lam": 1.0}), "x").plan.aligned
    entries = [item.site.size for item in aligned.items.values()]
    kept = [size_of(each.shape) for each in aligned.copies.values()]
    # Without room for one batch of data: what that takes is not known.
    check_fits(28 * sum(entries) + 4 * sum(kept), device, "grafting", GRAFT)


def _task_vector(
    recipe: Recipe, method: str, params: Mapping[str, Any], make: Callable[[Recipe, str], Candidate]
) -> dict[str, Array]:
    """The task vector in memory, or what a method leaves of it."""
    with make(replace(recipe, method=method, params=dict(params)), method) as candidate:
        if candidate.plan.base is None:
            raise ParameterError("a graft needs the base", fix="add --base")
        return candidate.updates()


def _tensors(
    module: Any,
    names: Mapping[str, str],
    plan: Plan,
    tau: Mapping[str, Array],
    first: Mapping[str, Array],
    seed: int,
    device: str,
) -> dict[str, _Tensor]:
    import torch

    assert plan.base is not None
    assert plan.base.checkpoint is not None
    stored = plan.base.checkpoint.tensors
    random = torch.Generator().manual_seed(seed)
    found = {}
    for own, parameter in module.named_parameters():
        name = names[own]
        if name not in tau or name in found:
            continue
        parameter.requires_grad_(True)
        start = np.asarray(read_all(stored[name]), np.float32)
        logits = torch.rand(start.shape, generator=random)
        found[name] = _Tensor(
            parameter,
            torch.from_numpy(start).to(device),
            torch.from_numpy(np.array(tau[name], np.float32)).to(device),
            torch.from_numpy(first[name].astype(np.float32)).to(device),
            logits.to(device),
        )
    if not found:
        raise ParameterError("the task's model has no parameter that the task vector moves")
    return found


def _loss(task: Task, module: Any, batch: Any) -> torch.Tensor:
    found: torch.Tensor = task.scorer.loss(outputs_of(task, module, batch), batch)
    if not isfinite(value := float(found.detach())):
        raise MergebenchError(f"task {task.name}: the loss is {value}", fix="a smaller --rate")
    return found


def _learn(
    tensors: Mapping[str, _Tensor], task: Task, module: Any, batch: Any, settings: Settings
) -> None:
    import torch

    for each in tensors.values():
        each.put(each.gates())
        each.parameter.grad = None
    loss = _loss(task, module, batch)
    if not loss.requires_grad:
        raise ParameterError(
            f"task {task.name}: its loss depends on no tensor that may be grafted",
            fix="leave less out with --exclude",
        )
    torch.autograd.backward(loss)
    for each in tensors.values():
        each.step(settings.rate, settings.l1)


def _rounded(
    tensors: Mapping[str, _Tensor], module: Any, work: Sequence[tuple[Task, Any]], device: str
) -> tuple[float, int]:
    """Mean loss with the rounded mask, and how many entries it has."""
    import torch

    masks = {name: each.gates() > 0.5 for name, each in tensors.items()}
    for name, each in tensors.items():
        each.put(masks[name].to(each.moved.dtype))
    with torch.no_grad():
        losses = [float(_loss(task, module, on(batch, device))) for task, batch in work]
    return sum(losses) / len(losses), sum(int(mask.count_nonzero()) for mask in masks.values())


def _masks(tensors: Mapping[str, _Tensor]) -> dict[str, Array]:
    return {name: (each.gates() > 0.5).cpu().numpy() for name, each in tensors.items()}


def _overlap(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """``|A ∩ B| / min(|A|, |B|)``, 1 where one of them is empty."""
    both = sum(int((one[name] & other[name]).sum()) for name in one)
    least = min(sum(int(mask.sum()) for mask in each.values()) for each in (one, other))
    return both / least if least else 1.0


def _sparse(plan: Plan, tau: Mapping[str, Array], masks: Mapping[str, Array]) -> Sparse:
    """The masked task vector, without entries that are zero."""
    assert plan.base is not None
    diffs = {}
    for name, mask in masks.items():
        values = np.asarray(tau[name], np.float32).reshape(-1)
        places = np.flatnonzero(mask.reshape(-1) & (values != 0))
        if places.size:
            diffs[name] = (tuple(mask.shape), places.astype(np.int64), values[places])
    identity = {"fingerprint": plan.base.fingerprint, "path": plan.base.label}
    return Sparse(diffs, {}, identity, sum(mask.size for mask in masks.values()))
