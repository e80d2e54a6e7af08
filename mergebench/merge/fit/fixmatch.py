"""Unsupervised FixMatch, the test-time objective of aTLAS (arXiv:2407.02880, appendix)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergebench.merge.fit.forward import Forward, rows_of

if TYPE_CHECKING:
    import torch

#: Most trusted examples of a class; the share of a batch that they fill up; the threshold, which
#: goes from the first to the second number.
_TRUSTED, _SHARE, _THRESHOLD = 100, 0.25, (0.9, 1.0)


class FixMatch:
    """Cross-entropy on trusted examples, and agreement with confident predictions on the others.

    As every epoch begins, the min(N/C, 100) most confident of the examples predicted as each
    class are trusted, N examples and C classes, at least one. They fill a quarter of every batch.
    Predictions ŷ of the others count where they are confident:
    ``-1[max σ(ŷ) > ω] σ(ŷ)ᵀ log ŷ'`` with ``σ(ŷ) = √ŷ / Σ√ŷ``; ω goes from 0.9 to 1. A task may
    have ``augment(batch)``, which gives the batch that ŷ' is predicted for; else it is the same.

    Parameters
    ----------
    forward : Forward
    official : bool
        As the authors' code does it: a tenth as many, ranked by the probability of a class among
        all examples, once; and as it marks every example as trusted, all of them are learned by
        cross-entropy with what the model predicts at the start.

    Deviations
    ----------
    The paper fills a quarter of a batch by sampling; here examples keep the batches that the task
    has made, and the means of both kinds are weighted 1 to 3.
    """

    def __init__(self, forward: Forward, *, official: bool = False) -> None:
        self.forward, self.official = forward, official
        self.once = official
        #: Per task and batch: which examples are trusted, and what they are taken for.
        self.trusted: list[list[torch.Tensor]] = []
        self.taken_for: list[list[torch.Tensor]] = []

    def begin(self) -> None:
        """Choose whom to trust."""
        import torch

        if self.official and self.trusted:
            return
        self.trusted, self.taken_for = [], []
        with torch.no_grad():
            for place, batches in enumerate(self.forward.batches):
                found = [self.forward.logits(place, b).softmax(-1).cpu() for b in batches]
                every = torch.cat(found)
                chosen = trusted(every, official=self.official)
                sizes = [len(each) for each in found]
                self.trusted.append(list(torch.split(chosen, sizes)))
                self.taken_for.append(list(torch.split(every.argmax(-1), sizes)))

    def of(self, place: int, number: int, done: float, random: torch.Generator) -> torch.Tensor:
        """See :class:`~mergebench.merge.fit.objectives.Loss`."""
        import torch

        batch, marks = self.forward.batches[place][number], self.trusted[place][number]
        others = torch.nonzero(~marks).flatten()
        parts = []
        if len(others):
            parts.append((1 - _SHARE, self._others(place, number, batch, others, done)))
        if bool(torch.cat(self.trusted[place]).any()):
            wanted = max(round(len(marks) * _SHARE), 1)
            parts.append((_SHARE, self._trusted(place, wanted, random)))
        total = sum(share for share, _ in parts)
        loss: Any = sum(share / total * part for share, part in parts)
        return loss  # type: ignore[no-any-return]

    def _others(
        self, place: int, number: int, batch: Any, others: torch.Tensor, done: float
    ) -> torch.Tensor:
        """Mean over the examples that are not trusted."""
        import torch

        scorer, count = self.forward.tasks[place].scorer, len(self.trusted[place][number])
        some = rows_of(batch, count, others)
        if self.official:
            labels = self.taken_for[place][number][others]
            return _cross_entropy(self._varied(place, some), labels)
        if hasattr(scorer, "augment"):
            with torch.no_grad():
                seen = self.forward.logits(place, some)
            varied = self._varied(place, some)
        else:
            varied = self.forward.logits(place, some)
            seen = varied.detach()
        target = flattened(seen.softmax(-1))
        low, high = _THRESHOLD
        counts = target.max(-1).values > low + (high - low) * done
        logs = torch.log_softmax(varied, dim=-1)
        return -((target * logs).sum(-1) * counts).mean()

    def _trusted(self, place: int, wanted: int, random: torch.Generator) -> torch.Tensor:
        """Mean over about ``wanted`` trusted examples, of whole batches as far as they go."""
        import torch

        counts = torch.tensor([int(marks.sum()) for marks in self.trusted[place]])
        total: Any = 0.0
        seen = 0
        while seen < wanted:
            number = int(torch.multinomial(counts.float(), 1, generator=random))
            marks = self.trusted[place][number]
            rows = torch.nonzero(marks).flatten()
            order = torch.randperm(len(rows), generator=random)[: wanted - seen]
            rows = rows[order]
            some = rows_of(self.forward.batches[place][number], len(marks), rows)
            labels = self.taken_for[place][number][rows]
            total = total + len(rows) * _cross_entropy(self._varied(place, some), labels)
            seen += len(rows)
        return total / seen  # type: ignore[no-any-return]

    def _varied(self, place: int, batch: Any) -> torch.Tensor:
        scorer = self.forward.tasks[place].scorer
        if hasattr(scorer, "augment"):
            batch = scorer.augment(batch)
        return self.forward.logits(place, batch)


def flattened(shares: torch.Tensor) -> torch.Tensor:
    """``√ŷ / Σ√ŷ`` of every row, which the paper calls sharpened; it flattens."""
    roots = shares.sqrt()
    return roots / roots.sum(-1, keepdim=True)


def trusted(shares: torch.Tensor, *, official: bool = False) -> torch.Tensor:
    """Which examples are trusted, (examples,), out of (examples, classes) probabilities.

    min(N/C, 100) for each class, at least one where there is any: the most confident of those
    predicted as it. ``official``: a tenth as many, those of the largest probability of it.
    """
    import torch

    examples, classes = shares.shape
    most = min(int(examples / classes / (10 if official else 1)), _TRUSTED)
    guessed = shares.argmax(-1)
    marks = torch.zeros(examples, dtype=torch.bool)
    for label in range(classes):
        mine = torch.arange(examples) if official else torch.nonzero(guessed == label).flatten()
        order = torch.argsort(shares[mine, label], descending=True, stable=True)
        marks[mine[order[: max(most, 1)]]] = True
    return marks


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(logits, labels.to(logits.device))
