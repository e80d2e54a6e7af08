"""A model in memory that a search for thresholds can sweep over, with a sample of any quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mergebench.compute.cut import Cut
from mergebench.core.site import Site
from mergebench.merge.at import At


class Tables:
    """Stacks by tensor name, cut into tiles; ``seen`` is what the sample shows instead."""

    def __init__(
        self, stacks: Mapping[str, Any], tile: int = 1 << 14, seen: np.ndarray | None = None
    ) -> None:
        self.stacks = {name: stacks[name] for name in sorted(stacks, key=str.encode)}
        self.tile, self.seen, self.sweeps = tile, seen, 0

    @property
    def models(self) -> int:
        """Rows of a stack."""
        return int(next(iter(self.stacks.values())).shape[0])

    @property
    def inputs(self) -> int:
        """Rows of a stack: nothing comes before."""
        return self.models

    @property
    def size(self) -> int:
        """Entries per model."""
        return sum(int(stack.shape[1]) for stack in self.stacks.values())

    def __call__(self, visit: Callable[[Any, At], Any]) -> Iterator[tuple[At, Any]]:
        """All tiles in order."""
        self.sweeps += 1
        weights, keys = (1.0,) * self.models, tuple(range(self.models))
        for name, stack in self.stacks.items():
            site = Site(name, (int(stack.shape[1]),))
            for start in range(0, site.size, self.tile):
                stop = min(start + self.tile, site.size)
                part = stack[:, start:stop]
                at = At(site, start, stop, weights, models=part, keys=keys)
                yield at, visit(part, at)

    def sample(self, count: int) -> Any:
        """Every so many-th entry, or what a test wants to be seen."""
        if self.seen is not None:
            return self.seen
        whole = np.concatenate([np.asarray(stack) for stack in self.stacks.values()], axis=1)
        return whole[:, :: max(self.size // count, 1)]


def largest(stacks: Mapping[str, np.ndarray], model: int, rank: int) -> dict[str, np.ndarray]:
    """The mask of the ``rank`` largest magnitudes by one stable sort, by tensor."""
    names = sorted(stacks, key=str.encode)
    flat = np.concatenate([np.abs(stacks[name][model]) for name in names])
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[: max(rank, 0)]] = True
    ends = np.cumsum([stacks[name].shape[1] for name in names])
    return dict(zip(names, np.split(mask, ends[:-1]), strict=True))


def kept(stack: np.ndarray, model: int, cut: Cut, name: str) -> np.ndarray:
    """What a cut keeps of a whole tensor, entry by entry."""
    magnitudes = np.abs(stack[model])
    first = np.arange(magnitudes.size) < cut.ties_until(name, 0, magnitudes.size)
    return (magnitudes > cut.value) | ((magnitudes == cut.value) & first)


def assert_exact(stacks: Mapping[str, np.ndarray], model: int, rank: int, cut: Cut) -> None:
    """The cut keeps exactly the largest entries; of zeros it may keep any number."""
    for name, mask in largest(stacks, model, rank).items():
        stack = stacks[name]
        zero = stack[model] == 0
        got = kept(stack, model, cut, name)
        assert np.array_equal(got & ~zero, mask & ~zero), (name, rank, cut)
