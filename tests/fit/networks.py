"""A small network of every kind of layer that statistics are collected of, and a task on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergebench.merge.fit.task import Task
from tests.helpers.files import write

#: As task files hold it: two blocks of a linear layer with a bias, and a head.
NETWORK = """
import torch


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"lin": torch.nn.Linear(3, 3)}) for _ in range(2)]
        )
        self.head = torch.nn.Linear(3, 4, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer["lin"](x))
        return self.head(x)


class Data:
    def __init__(self, seed=0, size=4):
        self.seed, self.size = seed, size

    def score(self, model, split):
        return {"norm": float((model.arrays()["head.weight"] ** 2).sum())}

    def module(self):
        return Network()

    def batches(self, split):
        draw = torch.Generator().manual_seed(self.seed)
        x = torch.randn(12, 3, generator=draw)
        y = torch.randint(4, (12,), generator=draw)
        for start in range(0, 12, self.size):
            yield {"x": x[start : start + self.size], "labels": y[start : start + self.size]}

    def forward(self, module, batch):
        return module(batch["x"])

    def logits(self, outputs, batch):
        return outputs

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch["labels"])


def task():
    return Data(SEED)
"""


def task_file(path: Path, seed: int = 0) -> Path:
    """A file with the task, for the command line."""
    path.write_text(NETWORK.replace("SEED", str(seed)), encoding="utf-8")
    return path


def task_of(seed: int = 0, size: int = 4) -> Task:
    """The task in memory."""
    scope: dict[str, Any] = {}
    exec(NETWORK.replace("SEED", "0"), scope)
    return Task(f"data{seed}", scope["Data"](seed, size), f"data{seed} {size}")


def values_of(seed: int) -> dict[str, np.ndarray]:
    """Parameters of the network."""
    random = np.random.default_rng(seed)
    shapes = {
        "layers.0.lin.weight": (3, 3),
        "layers.0.lin.bias": (3,),
        "layers.1.lin.weight": (3, 3),
        "layers.1.lin.bias": (3,),
        "head.weight": (4, 3),
    }
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save_network(place: Path, seed: int) -> Path:
    """A checkpoint of it."""
    place.mkdir(parents=True)
    write(place / "model.safetensors", values_of(seed))
    return place


class Runs:
    """A task in memory on any module and batches."""

    def __init__(self, module: torch.nn.Module, batches: list[Any]) -> None:
        self._module, self._batches = module, batches

    def score(self, model: Any, split: str) -> Mapping[str, float]:
        """Not asked for."""
        return {"none": 0.0}

    def module(self) -> torch.nn.Module:
        """The module itself."""
        return self._module

    def batches(self, split: str) -> Iterator[Any]:
        """The batches."""
        yield from self._batches

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Any number."""
        found: torch.Tensor = outputs.sum()
        return found
