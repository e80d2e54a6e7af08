"""What searches for thresholds look at in a sweep: every tile, or those that hold the last ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.magnitudes import magnitudes
from mergebench.compute.search import BINS, Found, Search, Tie


@dataclass(frozen=True)
class Survey:
    """Looks at tiles for several searches at once, in a sweep over ``size`` entries."""

    pending: Sequence[Search]
    size: int

    def __call__(self, stack: Any, at: Any) -> list[Found]:
        """What a tile holds, for every search."""
        found = magnitudes(stack, self.pending[0].kind)
        return [each.look(found[each.model], at.start) for each in self.pending]

    def fold(self, parts: Sequence[tuple[int, int, list[Found]]]) -> list[Found]:
        """What runs of tiles of one tensor hold together."""
        length = parts[-1][1] - parts[0][0]
        rooms = [4 * each.capacity * length // self.size + BINS for each in self.pending]
        columns = zip(*(found for _, _, found in parts), strict=True)
        spans = [(start, stop) for start, stop, _ in parts]
        return [
            each.joined([(*span, part) for span, part in zip(spans, column, strict=True)], room)
            for each, room, column in zip(self.pending, rooms, columns, strict=True)
        ]

    def by_kernel(self, kernel: Any, at: Any) -> list[Found] | None:
        """The same from stored entries, where that can be."""
        if self.pending[0].kind != np.int32:
            return None
        brackets = [(each.model, each.low, each.high) for each in self.pending]
        found = kernel.survey(brackets)
        if found is None:
            return None
        size = at.stop - at.start
        return [
            each.found(*map(int, tally), values, places, size)
            for each, tally, values, places in zip(self.pending, *found, strict=True)
        ]


@dataclass(frozen=True)
class Locate:
    """Finds ties where they are; other tiles are passed over."""

    ties: Sequence[Tie]

    def __call__(self, stack: Any, at: Any) -> list[tuple[int, NDArray[np.int64]]]:
        """Which of the ties are in a tile, and where in the tensor."""
        here = [
            (number, each)
            for number, each in enumerate(self.ties)
            if each.name == at.site.name and each.start <= at.start < each.stop
        ]
        if not here:
            return []
        found = magnitudes(stack, self.ties[0].target.kind)
        return [(number, each.find(found[each.target.model], at.start)) for number, each in here]
