"""The digits of one domain as a task of ``mergebench``: scores, and batches with a loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import DOMAINS, Split
from .evaluate import accuracies, evaluation_sets
from .model import DigitViT

_BATCH = 32
# What scores of a domain depend on beside the model: kept scores must miss when it changes.
_SOURCES = ("data.py", "evaluate.py", "model.py", "task.py")


class DomainTask:
    """Accuracy in one domain, on the ``val`` or ``test`` digits of a seed."""

    metric = "accuracy"

    def __init__(self, seed: int, domain: str) -> None:
        self.seed, self.domain = seed, domain

    def score(self, model: Any, split: str) -> dict[str, float]:
        """Share of correct labels of a model's arrays."""
        state = {name: torch.as_tensor(np.asarray(each)) for name, each in model.arrays().items()}
        self._live.load_state_dict(state)
        return {"accuracy": accuracies(self._live, {self.domain: self._digits(split)})[self.domain]}

    def module(self) -> nn.Module:
        """The architecture of base and experts."""
        return DigitViT()

    def batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """Images and labels."""
        digits = self._digits(split)
        for start in range(0, len(digits.labels), _BATCH):
            rows = slice(start, start + _BATCH)
            yield {
                "images": torch.from_numpy(digits.images[rows]),
                "labels": torch.from_numpy(digits.labels[rows]),
            }

    def forward(self, module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits; the labels are not shown."""
        logits: Tensor = module(batch["images"])
        return logits

    def logits(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """As they are."""
        return outputs

    def loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy."""
        return nn.functional.cross_entropy(outputs, batch["labels"])

    def _digits(self, split: str) -> Split:
        if split not in self._sets:
            self._sets[split] = evaluation_sets(self.seed, split)[self.domain]
        return self._sets[split]

    @cached_property
    def _sets(self) -> dict[str, Split]:
        return {}

    @cached_property
    def _live(self) -> DigitViT:
        return DigitViT()


def write_tasks(folder: Path, seed: int) -> dict[str, Path]:
    """Write a file per domain for ``--task FILE.py``; return them by domain."""
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in _SOURCES)).hexdigest()
    files = {}
    for domain in DOMAINS:
        files[domain] = folder / f"{domain}.py"
        files[domain].write_text(
            f'"""Digits, {domain}, of seed {seed}; code {digest[:12]}."""\n\n'
            f"import sys\n\nsys.path.insert(0, {str(here.parent)!r})\n\n"
            "from digits_demo.task import DomainTask\n\n\n"
            f"def task():\n    return DomainTask({seed}, {domain!r})\n",
            encoding="utf-8",
        )
    return files
