"""Order statistics of numbers computed from a stack, entry by entry, over a tensor or a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.namespace import as_numpy
from mergebench.compute.seen import Seen
from mergebench.compute.select import kth_magnitudes

Change = Callable[[Any], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class _Changed:
    """Changes a stack, wherever it is."""

    change: Change

    def __call__(self, stack: Any, at: Any) -> tuple[Any, Any]:
        return self.change(stack), at


@dataclass(frozen=True, eq=False)
class Mapped:
    """A sweep whose visitors see what ``change`` makes of each stack, (models, m)."""

    sweep: Any
    change: Change
    models: int

    @property
    def size(self) -> int:
        """Entries per row."""
        return int(self.sweep.size)

    def __call__(self, visit: Callable[[Any, Any], Any]) -> Iterator[tuple[Any, Any]]:
        """As the sweep itself."""
        found: Iterator[tuple[Any, Any]] = self.sweep(Seen(visit, _Changed(self.change)))
        return found

    def again(
        self, visit: Callable[[Any, Any], Any], spans: Collection[tuple[str, int, int]]
    ) -> Iterator[tuple[Any, Any]]:
        """As the sweep itself; of one that cannot look at some tiles only, all of them."""
        again = getattr(self.sweep, "again", None)
        seen = Seen(visit, _Changed(self.change))
        found: Iterator[tuple[Any, Any]] = self.sweep(seen) if again is None else again(seen, spans)
        return found

    def sample(self, count: int) -> NDArray[Any]:
        """As the sweep itself."""
        return self.change(self.sweep.sample(count))


def extremes(sweep: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """The smallest and the largest number of every row; zeros without entries."""

    def visit(stack: Any, at: Any) -> tuple[NDArray[Any], NDArray[Any]] | None:
        array = as_numpy(stack)
        return (array.min(axis=1), array.max(axis=1)) if array.shape[1] else None

    found = [part for _, part in sweep(visit) if part is not None]
    if not found:
        return np.zeros(sweep.models), np.zeros(sweep.models)
    lows, highs = zip(*found, strict=True)
    return np.min(lows, axis=0), np.max(highs, axis=0)


def kth_smallest(sweep: Any, places: Sequence[int]) -> NDArray[Any]:
    """The number at some place of each row sorted ascending, exactly, (models,) in float64.

    Parameters
    ----------
    sweep : Sweep
        Of float32 or float64 numbers of any sign, without NaN.
    places : sequence of int
        One for each row, from 0 to the number of entries less 1.
    """

    def halves(stack: Any) -> NDArray[Any]:
        array = as_numpy(stack)
        return np.concatenate([np.maximum(array, 0), np.maximum(-array, 0)])

    size, count = sweep.size, sweep.models
    low, high = extremes(sweep)
    # Of the positive numbers counted from the top, of the negative ones from the bottom.
    ranks = [[size - place] for place in places] + [[place + 1] for place in places]
    cuts = kth_magnitudes(Mapped(sweep, halves, 2 * count), ranks)
    found = np.zeros(count)
    for row, place in enumerate(places):
        above, below = cuts[row][0].value, cuts[count + row][0].value
        if place <= 0:
            found[row] = low[row]
        elif place >= size - 1:
            found[row] = high[row]
        else:
            found[row] = above if above > 0 else -below
    return found
