"""Tiny models whose right answers are known, and a task file that scores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.merge.fit.candidate import Candidate
from mergebench.merge.fit.scores import Scores
from mergebench.merge.fit.task import Task, UnderTest
from mergebench.recipe import ModelRef, Recipe
from tests.helpers.files import write

F32 = np.float32

#: A task in a file of its own: how near ``w`` is to a target, by numpy and by torch.
TASK = '''
import numpy as np


class Near:
    """Negative squared distance of w from a target; learned from with the same loss."""

    lower_is_better = ("loss",)

    def __init__(self, target=({target})):
        self.target = np.asarray(target, np.float32)

    def score(self, model, split):
        w = np.asarray(model.arrays()["w"], np.float64).reshape(-1)
        return {{"near": -float(((w - self.target.reshape(-1)) ** 2).sum())}}

    def module(self):
        import torch

        class Holder(torch.nn.Module):
            def __init__(self, shape):
                super().__init__()
                self.w = torch.nn.Parameter(torch.zeros(shape))
                self.b = torch.nn.Parameter(torch.zeros(2))

            def forward(self, one):
                return self.w * one, self.b * one

        return Holder(self.target.shape)

    def batches(self, split):
        import torch

        return [{{"one": torch.ones(())}}]

    def loss(self, outputs, batch):
        import torch

        w, b = outputs
        return ((w - torch.from_numpy(self.target)) ** 2).sum() + (b**2).sum()

    def logits(self, outputs, batch):
        return outputs[0].reshape(2, -1)


def task():
    return Near()
'''


def task_file(path: Path, target: Sequence[Any]) -> Path:
    """Write the task, with a target, and return its place."""
    path.write_text(TASK.format(target=repr(list(target)) + ","), encoding="utf-8")
    return path


def save_model(place: Path, w: Any, b: Any = (0.0, 0.0)) -> Path:
    """A checkpoint with two tensors."""
    place.mkdir(parents=True, exist_ok=True)
    write(place / "model.safetensors", {"b": np.asarray(b, F32), "w": np.asarray(w, F32)})
    return place


class Scored:
    """A scorer in memory: a function of ``w``."""

    def __init__(self, function: Any, **about: Any) -> None:
        self.function = function
        self.calls: list[str] = []
        for key, value in about.items():
            setattr(self, key, value)

    def score(self, model: UnderTest, split: str) -> Mapping[str, float]:
        """Whatever the function says; calls are counted."""
        self.calls.append(f"{model.label} {split}")
        found: Mapping[str, float] = self.function(np.asarray(model.arrays()["w"], np.float64))
        return found


def scores_of(function: Any, **options: Any) -> Scores:
    """Scores of a single task called ``t``."""
    return Scores([Task("t", Scored(function), "t")], **options)


def recipe_of(*places: Path, **options: Any) -> Recipe:
    """A recipe of models at weight 1."""
    return Recipe(models=tuple(ModelRef(str(each)) for each in places), **options)


def make(recipe: Recipe, label: str) -> Candidate:
    """A candidate with the usual memory."""
    return Candidate(recipe, label, workers=1)
