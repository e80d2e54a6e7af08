"""Descent on coefficients: whatever the loss, only they are learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, cos, isfinite, pi
from typing import TYPE_CHECKING, Any

from mergebench.compute.random import stream_of
from mergebench.core.errors import MergebenchError
from mergebench.merge.fit.forward import Forward, forward_of
from mergebench.merge.fit.memory import advised
from mergebench.merge.fit.mixture import Mixture
from mergebench.merge.fit.objectives import loss_of
from mergebench.merge.fit.settings import Objective, Settings
from mergebench.merge.fit.state import Kept, State
from mergebench.merge.fit.task import Task

if TYPE_CHECKING:
    import torch

__all__ = ["Learned", "Objective", "Settings", "learn"]

Tell = Callable[[str, int, int], None]
#: Told coefficients, and how many epochs are behind them; gives a score, more always better.
Watch = Callable[["torch.Tensor", int], float | None]


@dataclass(frozen=True, eq=False)
class Learned:
    """What came of it.

    Attributes
    ----------
    coefficients : torch tensor, (models, columns)
    history : tuple of float
        Mean loss of each epoch, over tasks and batches.
    scores : tuple of float or None
        Where scores were watched: of the start and after each epoch.
    epoch : int
        The epoch that was taken, counted from 1; 0 is the start.
    heat : tuple of float
        Learned factors of the tasks' logits.
    steps : int
        That were asked for.
    reach : float
        How far what is learned can move in them, about: AdamW moves by the rate in a step.
    """

    coefficients: torch.Tensor
    history: tuple[float, ...] = ()
    scores: tuple[float | None, ...] = field(default_factory=tuple)
    epoch: int = 0
    heat: tuple[float, ...] = ()
    steps: int = 0
    reach: float = 0.0


def learn(
    mixture: Mixture,
    tasks: Sequence[Task],
    settings: Settings,
    split: str,
    *,
    signs: Mapping[str, float] | None = None,
    tell: Tell | None = None,
    device: str = "cpu",
    watch: Watch | None = None,
    kept: Kept | None = None,
) -> Learned:
    """Minimise the sum of the tasks' losses over the coefficients of a mixture.

    Each step sees one batch of every task. The gradient of a coefficient is the inner product of
    the parameter's gradient and the task vector, taken after an ordinary backward pass: nothing
    but one model and its gradients is held beside the vectors.

    Parameters
    ----------
    mixture : Mixture
    tasks : sequence of Task
        Each with ``module``, ``batches`` and ``loss``; ``logits`` too for objectives without
        labels. The first one's module is used for all.
    settings : Settings
    split : str
        Whose batches are learned from; never the one that is reported on.
    signs : mapping of task name to number, optional
        Factor of each task's loss, 1 by default: -1 learns to forget it.
    tell : callable, optional
        Told ``(what, steps done, steps in all)``.
    device : str
    watch : callable, optional
        Scores coefficients before the first and after every epoch; the best are taken. Without
        it the last are, or with ``patience`` those after the epoch of the lowest loss.
    kept : Kept, optional
        Where what is learned so far is kept; a run that was killed goes on there, with the same
        result as one that was not.

    Raises
    ------
    ParameterError
        If a task cannot be learned from, or shares no parameter with the vectors.
    MergebenchError
        If a loss is not finite, or memory does not suffice.
    """
    with advised(device):
        forward = forward_of(mixture.plan, tasks, settings, split, device)
        run = _Run(mixture.to(forward.device), forward, settings, signs or {}, tell, watch, kept)
        try:
            return run.learned()
        except KeyboardInterrupt as error:
            if kept is not None and kept.path.exists():
                error.add_note(
                    "what was learned is kept: run the same command again to go on from there"
                )
            raise


class _Run:
    """One descent."""

    def __init__(
        self,
        mixture: Mixture,
        forward: Forward,
        settings: Settings,
        signs: Mapping[str, float],
        tell: Tell | None,
        watch: Watch | None,
        kept: Kept | None,
    ) -> None:
        import torch

        self.mixture, self.forward, self.settings = mixture, forward, settings
        self.tell, self.watch, self.kept = tell, watch, kept
        self.signs = [signs.get(task.name, 1.0) for task in forward.tasks]
        shape = (len(mixture.vectors), 1 if settings.shared else mixture.columns)
        self.leaf = torch.full(shape, settings.start, requires_grad=True)
        heat = torch.ones(len(forward.tasks), requires_grad=True) if settings.temperature else None
        self.leaves = [self.leaf] if heat is None else [self.leaf, heat]
        self.optimizer = torch.optim.AdamW(
            self.leaves, lr=settings.rate, weight_decay=settings.decay
        )
        kind = forward.device.partition(":")[0]
        self.scaler = torch.amp.GradScaler(kind, enabled=settings.precision == "float16")
        self.loss = loss_of(forward, settings, heat)
        self.longest = max(map(len, forward.batches))
        self.total = settings.steps or settings.epochs * self.longest
        for name in mixture.base:
            if name in forward.parameters:
                forward.parameters[name].requires_grad_(True)
        self.state = State()

    def coefficients(self) -> torch.Tensor:
        """(models, columns), differentiable in what is learned."""
        import torch

        found = torch.softmax(self.leaf, 0) if self.settings.softmax else self.leaf
        return found.expand(-1, self.mixture.columns)

    def learned(self) -> Learned:
        """Every epoch, or those that are left, and what is taken."""
        state, start = self.state, self.leaf.detach().clone()
        if self.kept is not None and (found := self.kept.load()) is not None:
            self.state = state = found
            self._restore(state)
        elif self.watch is not None:
            state.scores.append(self._seen(0))
        if state.tensors and self.loss.once:
            self._put(self._of(start))
            self.loss.begin()
        for epoch in range(state.epoch, ceil(self.total / self.longest)):
            if self._is_over():
                break
            self._epoch(epoch)
        if self.kept is not None:
            self.kept.remove()
        taken = state.best if state.best is not None else self.leaf.detach()
        last = len(state.history)
        heat = tuple(self.leaves[1].detach().tolist()) if len(self.leaves) > 1 else ()
        return Learned(
            self._of(taken).clone(),
            tuple(state.history),
            tuple(state.scores),
            state.best_epoch if state.best is not None else last,
            heat,
            self.total,
            self.total * self.settings.rate * (0.5 if self.settings.cosine else 1.0),
        )

    def _is_over(self) -> bool:
        patience = self.settings.patience
        return bool(patience) and len(self.state.history) - self.state.best_epoch >= patience

    def _epoch(self, epoch: int) -> None:
        import torch

        state, settings, counts = self.state, self.settings, list(map(len, self.forward.batches))
        if state.turn == 0:
            state.began = self.leaf.detach().clone()
        # What an objective looks at as an epoch begins is the model as it was then.
        self._put(self._of(state.began))
        self.loss.begin()
        orders = [
            torch.randperm(count, generator=_generator(settings.seed, epoch, place)).tolist()
            for place, count in enumerate(counts)
        ]
        for turn in range(state.turn, min(self.longest, self.total - epoch * self.longest)):
            step = epoch * self.longest + turn
            self._step(step, [order[turn % len(order)] for order in orders])
            if self.tell is not None:
                shown = f"epoch {epoch + 1}, loss {state.mean:.4g}"
                if state.scores and (score := state.scores[-1]) is not None:
                    shown += f", score {score:.4g}"
                self.tell(shown, step + 1, self.total)
            state.turn = turn + 1
            if self.kept is not None and self.kept.is_due():
                self._keep()
        state.history.append(state.mean)
        state.losses, state.count, state.turn, state.epoch = 0.0, 0, 0, epoch + 1
        if self.watch is not None:
            state.scores.append(self._seen(epoch + 1))
        elif settings.patience and -state.history[-1] > state.best_value:
            state.best_value = -state.history[-1]
            state.best, state.best_epoch = self.leaf.detach().clone(), epoch + 1
        if self.kept is not None:
            self._keep()

    def _seen(self, epoch: int) -> float | None:
        """The score of the coefficients as they are, which are noted if they are the best."""
        assert self.watch is not None
        score = self.watch(self._of(self.leaf.detach()), epoch)
        if score is not None and score > self.state.best_value:
            self.state.best_value, self.state.best_epoch = score, epoch
            self.state.best = self.leaf.detach().clone()
        return score

    def _step(self, step: int, numbers: Sequence[int]) -> None:
        import torch

        settings, state = self.settings, self.state
        if settings.cosine:
            for group in self.optimizer.param_groups:
                group["lr"] = settings.rate * (1 + cos(pi * step / self.total)) / 2
        mixed = self.coefficients()
        self._put(mixed.detach())
        for place, number in enumerate(numbers):
            random = _generator(settings.seed, step, place, 1)
            loss = self.loss.of(place, number, step / self.total, random)
            value = float(loss.detach())
            if not isfinite(value):
                raise MergebenchError(
                    f"task {self.forward.tasks[place].name}: the loss is {value} at step "
                    f"{step + 1}",
                    fix="a smaller rate, or bounds on the coefficients",
                )
            state.losses, state.count = state.losses + value, state.count + 1
            # Predictions of which none counts move nothing.
            if loss.requires_grad:
                torch.autograd.backward(self.scaler.scale(loss * self.signs[place]))
        parameters = self.forward.parameters
        found = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        torch.autograd.backward(mixed, self.mixture.gradient(found))
        for each in parameters.values():
            each.grad = None
        self.scaler.unscale_(self.optimizer)
        if settings.l1 or settings.l2:
            penalty = settings.l1 * self.leaf.abs().sum() + settings.l2 * (self.leaf**2).sum()
            torch.autograd.backward(penalty)
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(self.leaves, settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with torch.no_grad():
            if settings.low is not None or settings.high is not None:
                self.leaf.clamp_(settings.low, settings.high)

    def _of(self, leaf: torch.Tensor) -> torch.Tensor:
        """The coefficients that some learned numbers stand for."""
        import torch

        with torch.no_grad():
            found = torch.softmax(leaf, 0) if self.settings.softmax else leaf
            return found.expand(-1, self.mixture.columns)

    def _put(self, coefficients: torch.Tensor) -> None:
        import torch

        with torch.no_grad():
            for name, value in self.mixture.each_value(coefficients):
                if name in self.forward.parameters:
                    parameter = self.forward.parameters[name]
                    parameter.copy_(value.reshape(parameter.shape))

    def _keep(self) -> None:
        assert self.kept is not None
        self.state.tensors = {f"leaf.{i}": each.detach() for i, each in enumerate(self.leaves)}
        for number, each in self.optimizer.state_dict()["state"].items():
            for key, value in each.items():
                self.state.tensors[f"optimizer.{number}.{key}"] = value
        self.state.scaler = self.scaler.state_dict()
        self.kept.save(self.state)

    def _restore(self, state: State) -> None:
        import torch

        whole = self.optimizer.state_dict()
        moments: dict[int, dict[str, Any]] = {}
        for key, value in state.tensors.items():
            kind, number, *rest = key.split(".")
            if kind == "leaf":
                with torch.no_grad():
                    self.leaves[int(number)].copy_(value)
            else:
                moments.setdefault(int(number), {})[rest[0]] = value
        self.optimizer.load_state_dict({**whole, "state": moments})
        self.scaler.load_state_dict(state.scaler)


def _generator(*parts: int) -> torch.Generator:
    """Random numbers that depend on where a run is alone, so that one can go on anywhere."""
    import torch

    return torch.Generator().manual_seed(stream_of(*parts) >> 1)
