"""What a task is: something that scores a model, and, for gradients, batches with a loss."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import Array

#: Metrics of which less is better, wherever they come from.
LOWER_IS_BETTER = frozenset({"loss", "nll", "perplexity", "ppl", "error", "wer", "cer", "mse"})


class UnderTest(Protocol):
    """A model as a scorer is handed it; it exists no longer than the call.

    Attributes
    ----------
    label : str
    """

    @property
    def label(self) -> str:
        """What it is called in tables."""
        ...

    def folder(self) -> Path:
        """A folder of the whole model, config and tokenizer beside it; not to be written to."""
        ...

    def arrays(self) -> Mapping[str, Array]:
        """Tensor name -> values, as the folder would have them, without writing one."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Anything with a method ``score``.

    A scorer may also have ``metric`` (a text: the metric that counts, the first one by default)
    and ``lower_is_better`` (names of metrics).
    """

    def score(self, model: UnderTest, split: str) -> Mapping[str, float]:
        """Metric -> value on a split of the task's data, such as ``val`` or ``test``."""
        ...


@runtime_checkable
class Learnable(Protocol):
    """What fits by gradients ask for besides.

    ``loss`` gets what ``module()`` returned for a batch, which is called as ``module(**batch)``
    for mappings and ``module(*batch)`` for tuples. Parameters and buffers of the module go by the
    names of tensors in the checkpoint, or by those without the checkpoint's prefix.
    """

    def module(self) -> Any:
        """A ``torch.nn.Module`` of the base's architecture; its values do not matter."""
        ...

    def batches(self, split: str) -> Iterable[Any]:
        """Batches of tensors, the same ones whenever it is called."""
        ...

    def loss(self, outputs: Any, batch: Any) -> Any:
        """A scalar tensor to be minimised; the mean over the batch."""
        ...


@runtime_checkable
class Classifies(Learnable, Protocol):
    """What is asked for besides by fits that have no labels, and by those that need classes."""

    def logits(self, outputs: Any, batch: Any) -> Any:
        """(examples, classes) out of what the module returned for a batch."""
        ...


@runtime_checkable
class FewShot(Learnable, Protocol):
    """What is asked for besides by fits that learn from a few examples of each class.

    Fits by FixMatch also take ``augment(batch)`` where there is one: the same examples, changed
    strongly.
    """

    def few(self, split: str, shots: int, seed: int) -> Iterable[Any]:
        """Batches of ``shots`` examples of each class, drawn by ``seed``."""
        ...


@dataclass(frozen=True)
class Task:
    """A scorer with a name.

    Attributes
    ----------
    name : str
    scorer : Scorer
    spec : str
        As it was given, with what its scores depend on: part of what scores are kept under.
    """

    name: str
    scorer: Any
    spec: str

    @property
    def lower_is_better(self) -> Collection[str]:
        """Names of metrics of which less is better."""
        return frozenset(getattr(self.scorer, "lower_is_better", LOWER_IS_BETTER))

    def metric(self, scores: Mapping[str, float]) -> str:
        """The metric that counts.

        Raises
        ------
        MergebenchError
            If it is not among the scores.
        """
        wanted = getattr(self.scorer, "metric", None) or next(iter(scores), None)
        if wanted not in scores:
            raise MergebenchError(
                f"task {self.name}: has no metric {wanted!r}", got=", ".join(scores) or "no score"
            )
        return str(wanted)

    def value(self, scores: Mapping[str, float]) -> float:
        """The metric that counts, with more always better."""
        metric = self.metric(scores)
        return -scores[metric] if metric in self.lower_is_better else scores[metric]


def checked(scores: Any, task: str) -> dict[str, float]:
    """What a scorer has returned, if it is what it should be.

    Raises
    ------
    MergebenchError
        If it is no mapping of texts to numbers, or one of them is not finite.
    """
    if not isinstance(scores, Mapping) or not scores:
        raise MergebenchError(
            f"task {task}: gave no scores", got=repr(scores)[:200], expected="{metric: number}"
        )
    found = {}
    for metric, value in scores.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise MergebenchError(
                f"task {task}: {metric} is no number", got=repr(value)[:200]
            ) from None
        if not isfinite(number):
            raise MergebenchError(f"task {task}: {metric} is not finite", got=str(number))
        found[str(metric)] = number
    return found
