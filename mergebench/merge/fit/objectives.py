"""What is minimised: losses of labels, or of predictions alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mergebench.merge.fit.forward import Forward
from mergebench.merge.fit.settings import Settings
from mergebench.merge.fit.task import Classifies

if TYPE_CHECKING:
    import torch


class Loss(Protocol):
    """One objective over some tasks.

    Attributes
    ----------
    once : bool
        Whether :meth:`begin` looks at the model of the start alone.
    """

    once: bool

    def begin(self) -> None:
        """Look at the model as an epoch begins."""
        ...

    def of(self, place: int, number: int, done: float, random: torch.Generator) -> torch.Tensor:
        """The loss of one batch of a task, a scalar.

        Parameters
        ----------
        place, number : int
            Which task, and which of its batches.
        done : float
            Share of all steps that is done, in [0, 1).
        random : torch.Generator
            For what is drawn.
        """
        ...


class Labels:
    """The tasks' own losses.

    Parameters
    ----------
    forward : Forward
    heat : torch tensor (tasks,), optional
        A factor of each task's logits, learned with the rest (learned soups); the loss is then
        the cross-entropy of the batch's labels, for tasks that have logits and labels.
    """

    once = False

    def __init__(self, forward: Forward, heat: torch.Tensor | None = None) -> None:
        self.forward, self.heat = forward, heat

    def begin(self) -> None:
        """There is nothing to look at."""

    def of(self, place: int, number: int, done: float, random: torch.Generator) -> torch.Tensor:
        """See :class:`Loss`."""
        import torch

        batch, scorer = self.forward.batches[place][number], self.forward.tasks[place].scorer
        labels = labels_of(batch) if isinstance(scorer, Classifies) else None
        if self.heat is not None and labels is not None:
            logits = self.forward.logits(place, batch)
            heated = self.heat[place].to(logits.device) * logits
            return torch.nn.functional.cross_entropy(heated, labels.to(logits.device))
        with self.forward.cast():
            outputs, batch = self.forward.outputs(place, batch)
            found: torch.Tensor = scorer.loss(outputs, batch)
        return found.float()


def labels_of(batch: Any) -> torch.Tensor | None:
    """The labels of a batch: ``labels`` of a mapping, or the last of a tuple; ``None`` if none."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and batch:
        found = batch[-1]
    return found if hasattr(found, "to") else None


class Entropy:
    """The entropy of predictions, mean over a batch (arXiv:2310.02575, section 3.2)."""

    once = False

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def begin(self) -> None:
        """There is nothing to look at."""

    def of(self, place: int, number: int, done: float, random: torch.Generator) -> torch.Tensor:
        """See :class:`Loss`."""
        import torch

        logits = self.forward.logits(place, self.forward.batches[place][number])
        logs = torch.log_softmax(logits, dim=-1)
        return -(logs.exp() * logs).sum(-1).mean()


def loss_of(forward: Forward, settings: Settings, heat: torch.Tensor | None) -> Loss:
    """The objective that settings name."""
    from mergebench.merge.fit.fixmatch import FixMatch

    if settings.objective == "labels":
        return Labels(forward, heat)
    if settings.objective == "entropy":
        return Entropy(forward)
    return FixMatch(forward, official=settings.compat == "official")
