"""A task of points and a linear classifier, for objectives that look at classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergebench.merge.fit.mixture import Mixture, load_mixture
from mergebench.merge.fit.task import Task, UnderTest
from tests.fit.support import F32, make, recipe_of, save_model

#: The base, which tells nothing apart, and three directions that matter more and less.
BASE = np.zeros((2, 2), F32)
DIRECTIONS = {
    "right": np.array([[1.0, 0.0], [-1.0, 0.0]], F32),
    "up": np.array([[0.0, 0.5], [0.0, -0.5]], F32),
    "wrong": np.array([[-0.5, 0.25], [0.5, 0.0]], F32),
}


class Lines:
    """Points left and right of a line: cross-entropy and accuracy of ``x @ w.T + b``."""

    metric = "accuracy"

    def __init__(self, count: int = 24, batch: int = 8, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        points = random.normal(size=(count, 2)) + np.array([0.3, 0.0])
        self.points = torch.tensor(points, dtype=torch.float32)
        self.labels = torch.tensor((points[:, 0] < 0).astype(np.int64))
        self.batch = batch
        self.scored: list[np.ndarray] = []

    def score(self, model: UnderTest, split: str) -> Mapping[str, float]:
        """Accuracy and loss."""
        arrays = model.arrays()
        self.scored.append(np.array(arrays["w"], F32))
        w, b = (torch.tensor(np.array(arrays[name], F32)) for name in ("w", "b"))
        logits = self.points @ w.T + b
        right = float((logits.argmax(1) == self.labels).float().mean())
        loss = float(torch.nn.functional.cross_entropy(logits, self.labels))
        return {"accuracy": right, "loss": loss}

    def module(self) -> Any:
        """The classifier; its values are no matter."""

        class Classifier(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = torch.nn.Parameter(torch.full((2, 2), 7.0))
                self.b = torch.nn.Parameter(torch.full((2,), 7.0))

            def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.linear(x, self.w, self.b)

        return Classifier()

    def batches(self, split: str) -> Iterator[dict[str, torch.Tensor]]:
        """Points and labels."""
        for start in range(0, len(self.points), self.batch):
            some = slice(start, start + self.batch)
            yield {"x": self.points[some], "labels": self.labels[some]}

    def loss(self, outputs: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        """Mean cross-entropy."""
        return torch.nn.functional.cross_entropy(outputs, batch["labels"])

    def logits(self, outputs: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        """What the classifier says."""
        return outputs


def lines(name: str = "lines", **about: Any) -> Task:
    """The task by a name."""
    return Task(name, Lines(**about), name)


def three_vectors(folder: Path, shift: float = 0.25, **options: Any) -> Mixture:
    """A mixture of the three directions; b is moved by the first, apart by ``shift``."""
    base = save_model(folder / "base", BASE)
    places = [
        save_model(folder / name, BASE + each, (shift, -shift) if name == "right" else (0, 0))
        for name, each in DIRECTIONS.items()
    ]
    recipe = recipe_of(*places, base=str(base), method="task_arithmetic", params={"lam": 1.0})
    return load_mixture(make(recipe, "mixture").plan, torch.float32, **options)
