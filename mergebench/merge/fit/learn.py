"""Descent on coefficients: whatever the loss, only they are learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, isfinite, pi
from typing import TYPE_CHECKING, Any, Literal

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.merge.fit.live import names_in
from mergebench.merge.fit.mixture import Mixture
from mergebench.merge.fit.task import Classifies, Learnable, Task

if TYPE_CHECKING:
    import torch

Objective = Literal["labels", "entropy"]
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How coefficients are learned; the defaults are those of aTLAS for task addition.

    Attributes
    ----------
    objective : labels or entropy
        The tasks' own losses, or the entropy of predictions, which needs no labels.
    epochs : int
        Passes over the longest split.
    rate, decay, clip : float
        Of AdamW; ``clip`` bounds the norm of the gradient (0: not at all).
    cosine : bool
        Let the rate fall to zero along half a cosine.
    start : float
        Of every coefficient.
    low, high : float or None
        Coefficients are put back between them after every step.
    shared : bool
        One coefficient per model, rather than per model and tensor.
    l1, l2 : float
        Added: ``l1 · Σ|c| + l2 · Σc²``.
    seed : int
        Of the order of batches.
    """

    objective: Objective = "labels"
    epochs: int = 20
    rate: float = 1e-3
    decay: float = 0.1
    clip: float = 1.0
    cosine: bool = False
    start: float = 0.0
    low: float | None = None
    high: float | None = None
    shared: bool = False
    l1: float = 0.0
    l2: float = 0.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Learned:
    """What came of it.

    Attributes
    ----------
    coefficients : torch tensor, (models, tensors)
    history : tuple of float
        Mean loss of each epoch, over tasks and batches.
    """

    coefficients: torch.Tensor
    history: tuple[float, ...] = field(default_factory=tuple)


def learn(
    mixture: Mixture,
    tasks: Sequence[Task],
    settings: Settings,
    split: str,
    *,
    signs: Mapping[str, float] | None = None,
    tell: Tell | None = None,
    device: str = "cpu",
) -> Learned:
    """Minimise the sum of the tasks' losses over the coefficients of a mixture.

    Each step sees one batch of every task. The gradient of a coefficient is the inner product of
    the parameter's gradient and the task vector, taken after an ordinary backward pass: nothing
    but one model and its gradients is held beside the vectors.

    Parameters
    ----------
    mixture : Mixture
    tasks : sequence of Task
        Each with ``module``, ``batches`` and ``loss``; ``logits`` too for ``entropy``. The first
        one's module is used for all.
    settings : Settings
    split : str
        Whose batches are learned from; never the one that is reported on.
    signs : mapping of task name to number, optional
        Factor of each task's loss, 1 by default: -1 learns to forget it.
    tell : callable, optional
        Told ``(what, steps done, steps in all)``.
    device : str

    Raises
    ------
    ParameterError
        If a task cannot be learned from, or shares no parameter with the vectors.
    MergebenchError
        If a loss is not finite.
    """
    import torch

    for task in tasks:
        _check(task, settings)
    module = tasks[0].scorer.module().to(device)
    module.eval()
    module.requires_grad_(False)
    parameters = _moved(module, mixture)
    for each in parameters.values():
        each.requires_grad_(True)
    shape = (len(mixture.vectors), 1 if settings.shared else len(mixture.names))
    learned = torch.full(shape, settings.start, requires_grad=True)
    optimizer = torch.optim.AdamW([learned], lr=settings.rate, weight_decay=settings.decay)
    batches = [list(task.scorer.batches(split)) for task in tasks]
    if not all(batches):
        raise ParameterError(f"split {split!r} is empty", fix="name another one")
    longest = max(map(len, batches))
    total, history = settings.epochs * longest, []
    random = torch.Generator().manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        orders = [torch.randperm(len(each), generator=random).tolist() for each in batches]
        losses = []
        for turn in range(longest):
            step = epoch * longest + turn
            if settings.cosine:
                for group in optimizer.param_groups:
                    group["lr"] = settings.rate * (1 + cos(pi * step / total)) / 2
            _put(parameters, mixture, learned.detach().expand(-1, len(mixture.names)))
            for task, some, order in zip(tasks, batches, orders, strict=True):
                loss = _loss(task, module, some[order[turn % len(order)]], settings, device)
                value = float(loss.detach())
                if not isfinite(value):
                    raise MergebenchError(
                        f"task {task.name}: the loss is {value} at step {step + 1}",
                        fix="a smaller rate, or bounds on the coefficients",
                    )
                torch.autograd.backward(loss * (signs or {}).get(task.name, 1.0))
                losses.append(value)
            gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
            found = mixture.gradient(gradients)
            _step(optimizer, learned, found, settings)
            for each in parameters.values():
                each.grad = None
            if tell is not None:
                tell(f"epoch {epoch + 1}, loss {sum(losses) / len(losses):.4f}", step + 1, total)
        history.append(sum(losses) / len(losses))
    return Learned(learned.detach().expand(-1, len(mixture.names)).clone(), tuple(history))


def _check(task: Task, settings: Settings) -> None:
    wanted: Any = Learnable if settings.objective == "labels" else Classifies
    if not isinstance(task.scorer, wanted):
        raise ParameterError(
            f"task {task.name}: cannot be learned from",
            got=type(task.scorer).__name__,
            expected="module(), batches(split), loss(outputs, batch)"
            + (" and logits(outputs, batch)" if settings.objective == "entropy" else ""),
            fix="a task such as classify:FILE.json, or one written in Python",
        )


def _moved(module: Any, mixture: Mixture) -> dict[str, torch.nn.Parameter]:
    """Name in the checkpoint -> parameter, of what has coefficients."""
    names = names_in(module, mixture.plan.aligned.order)
    held = dict(module.named_parameters())
    found = {names[name]: held[name] for name in held if names[name] in mixture.base}
    if not found:
        raise ParameterError("the task's model has no parameter that a task vector moves")
    return found


def _put(parameters: Mapping[str, Any], mixture: Mixture, coefficients: torch.Tensor) -> None:
    import torch

    with torch.no_grad():
        for name, value in mixture.values(coefficients).items():
            if name in parameters:
                parameters[name].copy_(value.reshape(parameters[name].shape))


def _loss(task: Task, module: Any, batch: Any, settings: Settings, device: str) -> torch.Tensor:
    import torch

    batch = _on(batch, device)
    scorer = task.scorer
    if hasattr(scorer, "forward"):
        outputs = scorer.forward(module, batch)
    elif isinstance(batch, Mapping):
        outputs = module(**batch)
    else:
        outputs = module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
    if settings.objective == "labels":
        found: torch.Tensor = scorer.loss(outputs, batch)
        return found
    logs = torch.log_softmax(scorer.logits(outputs, batch), dim=-1)
    return -(logs.exp() * logs).sum(-1).mean()


def _on(batch: Any, device: str) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _on(value, device) for key, value in batch.items()}
    return (
        type(batch)(_on(each, device) for each in batch)
        if isinstance(batch, (tuple, list))
        else batch
    )


def _step(optimizer: Any, learned: torch.Tensor, found: torch.Tensor, settings: Settings) -> None:
    import torch

    wide = learned.detach()
    gradient = found.sum(1, keepdim=True) if settings.shared else found
    gradient = gradient + settings.l1 * wide.sign() + 2 * settings.l2 * wide
    learned.grad = gradient
    if settings.clip:
        torch.nn.utils.clip_grad_norm_([learned], settings.clip)
    optimizer.step()
    with torch.no_grad():
        if settings.low is not None or settings.high is not None:
            learned.clamp_(settings.low, settings.high)
