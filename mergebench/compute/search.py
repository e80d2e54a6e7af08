"""The search for one threshold: a bracket that is narrowed until the answer is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.cut import LAST, Cut
from mergebench.compute.magnitudes import value_of

#: Of a histogram of what lies inside a bracket.
BINS = 1 << 12

#: Per tile where it is, and how many of its entries are at the upper and at the lower end.
End = tuple[int, int, int, int]


@dataclass(frozen=True)
class Found:
    """What one tile, or a run of them, holds around the bracket of a search.

    Attributes
    ----------
    above, upper, inside, lower : int
        How many magnitudes are above the bracket, at its upper end, between its ends, and at its
        lower end, if that is another.
    values, places : array or None
        Those between the ends, and where they are in the tensor.
    counts : array or None
        A histogram of them instead, where they are many.
    ends : tuple of End
        The tiles with entries at an end of the bracket, where there are several tiles.
    """

    above: int
    upper: int
    inside: int
    lower: int
    values: NDArray[Any] | None = None
    places: NDArray[Any] | None = None
    counts: NDArray[Any] | None = None
    ends: tuple[End, ...] = ()

    def ends_at(self, start: int, stop: int) -> tuple[End, ...]:
        """The tiles with entries at an end of the bracket, of the entries ``start:stop``."""
        if self.ends or not (self.upper or self.lower):
            return self.ends
        return ((start, stop, self.upper, self.lower),)


@dataclass
class Search:
    """The search for one threshold: the ``rank``-th largest magnitude of one model.

    The ends of the bracket are counted only, since in stored dtypes many entries may equal them.
    """

    model: int
    rank: int
    low: int
    high: int
    kind: np.dtype[Any]
    capacity: int
    cut: Cut | None = None
    above: int = 0
    upper: int = 0
    inside: int = 0
    lower: int = 0
    kept: list[tuple[bytes, NDArray[Any], NDArray[Any]]] = field(default_factory=list)
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS + 1, np.int64))
    crowded: bool = False
    #: Per tile where it is, and how many of its entries are at the upper and at the lower end.
    ends: list[tuple[str, int, int, int, int]] = field(default_factory=list)

    def start_round(self) -> None:
        """Forget what was counted in a bracket, for another sweep."""
        self.above = self.upper = self.inside = self.lower = 0
        self.kept, self.ends = [], []
        self.counts = np.zeros(BINS + 1, np.int64)
        self.crowded = False

    @property
    def shift(self) -> int:
        """Bits by which integers of one bin of the histogram differ."""
        return ((self.high - self.low) // BINS).bit_length()

    def room(self, size: int) -> int:
        """How many entries of a tile of a size are gathered; more are only counted."""
        return 0 if self.crowded else size // 8 + BINS

    def look(self, magnitudes: NDArray[Any], start: int) -> Found:
        """Count around the bracket and gather what lies inside; small whatever the data are."""
        above = int(np.count_nonzero(magnitudes > self.high))
        upper = int(np.count_nonzero(magnitudes == self.high))
        lower = int(np.count_nonzero(magnitudes == self.low))
        places = np.flatnonzero((magnitudes > self.low) & (magnitudes < self.high))
        values, size = magnitudes[places], magnitudes.size
        return self.found(above, upper, places.size, lower, values, places + start, size)

    def found(
        self,
        above: int,
        upper: int,
        inside: int,
        lower: int,
        values: NDArray[Any],
        places: NDArray[Any],
        size: int,
    ) -> Found:
        """What a tile of a size holds; ``values`` and ``places`` may be longer than ``inside``."""
        lower = 0 if self.low == self.high else lower
        if inside <= self.room(size):
            # Copies, so that nothing larger is held on to.
            kept, where = values[:inside].copy(), places[:inside].copy()
            return Found(above, upper, inside, lower, kept, where)
        return Found(above, upper, inside, lower, counts=self._histogram(values[:inside]))

    def _histogram(self, values: NDArray[Any]) -> NDArray[np.int64]:
        return np.bincount((values - self.low) >> self.shift, minlength=BINS + 1)

    def binned(self, found: Found) -> NDArray[np.int64]:
        """A histogram of what lies inside."""
        if found.values is None:
            assert found.counts is not None
            counts: NDArray[np.int64] = found.counts
            return counts
        return self._histogram(found.values)

    def joined(self, parts: Sequence[tuple[int, int, Found]], room: int) -> Found:
        """What runs of tiles of one tensor hold together, given as ``(start, stop, found)``.

        More than ``room`` entries inside of the bracket are only counted.
        """
        found = [each for _, _, each in parts]
        sums = (sum(column) for column in zip(*(
            (each.above, each.upper, each.inside, each.lower) for each in found
        ), strict=True))  # fmt: skip
        above, upper, inside, lower = sums
        ends = tuple(end for start, stop, each in parts for end in each.ends_at(start, stop))
        if inside <= room and all(each.values is not None for each in found):
            values = np.concatenate([each.values for each in found if each.values is not None])
            places = np.concatenate([each.places for each in found if each.places is not None])
            return Found(above, upper, inside, lower, values, places, ends=ends)
        counts = sum((self.binned(each) for each in found), np.zeros(BINS + 1, np.int64))
        return Found(above, upper, inside, lower, counts=counts, ends=ends)

    def take(self, at: Any, found: Found) -> None:
        """Add what a tile, or a run of them, holds."""
        self.above += found.above
        self.upper += found.upper
        self.inside += found.inside
        self.lower += found.lower
        for end in found.ends_at(at.start, at.stop):
            self.ends.append((at.site.name, *end))
        if found.values is None or found.places is None:
            self.counts += self.binned(found)
            self.crowded = True
        elif found.inside:
            self.counts += self.binned(found)
            self.kept.append((at.site.name.encode(), found.values, found.places))
        if self.crowded or self.inside > self.capacity:
            self.crowded, self.kept = True, []

    def conclude(self) -> Tie | None:
        """Settle the threshold, say which of its ties is the last, or choose another bracket."""
        to_upper = self.above + self.upper
        to_inside = to_upper + self.inside
        if self.rank <= self.above:
            self.low, self.high = self.high + 1, int(np.iinfo(self.kind).max)
        elif self.rank <= to_upper:
            return self._tie(self.high, self.rank - self.above, 0)
        elif self.rank <= to_inside and self.crowded:
            self.low, self.high, _ = self._bin(to_upper)
        elif self.rank <= to_inside:
            self.cut = self._settle(to_upper)
        elif self.rank <= to_inside + self.lower:
            return self._tie(self.low, self.rank - to_inside, 1)
        # Zeros are never gathered (the lowest bracket starts at 1): keeping one changes nothing,
        # so a threshold of zero needs no place.
        elif self.low <= 1:
            self.cut = Cut(0.0, LAST)
        else:
            self.low, self.high = 1, self.low - 1
        return None

    def _tie(self, number: int, wanted: int, end: int) -> Tie:
        for name, start, stop, *ties in self.ends:
            if wanted <= ties[end]:
                return Tie(self, name, start, stop, number, wanted)
            wanted -= ties[end]
        raise AssertionError("unreachable: the wanted rank lies at an end of the bracket")

    def _settle(self, above: int) -> Cut:
        bottom, top, above = self._bin(above)
        values = np.concatenate([v[(v >= bottom) & (v <= top)] for _, v, _ in self.kept])
        wanted = self.rank - above
        threshold = int(np.partition(values, values.size - wanted)[values.size - wanted])
        ties = wanted - int(np.count_nonzero(values > threshold))
        for name, part, places in self.kept:
            equal = places[part == threshold]
            if ties <= equal.size:
                return Cut(value_of(threshold, self.kind), name, int(equal[ties - 1]))
            ties -= equal.size
        raise AssertionError("unreachable: the wanted rank lies inside the bracket")

    def _bin(self, to_upper: int) -> tuple[int, int, int]:
        """The ends of the bin of the wanted rank, and how many magnitudes are above it."""
        above = to_upper + np.cumsum(self.counts[::-1])[::-1]
        # The highest one with at least `rank` entries from it up.
        chosen = int(np.flatnonzero(above >= self.rank)[-1])
        bottom = self.low + (chosen << self.shift)
        top = min(bottom + (1 << self.shift) - 1, self.high)
        return bottom, top, int(above[chosen] - self.counts[chosen])


@dataclass(frozen=True)
class Tie:
    """Entries that equal a threshold: the last one that stays is the ``wanted``-th of a tile."""

    target: Search
    name: str
    start: int
    stop: int
    number: int
    wanted: int

    def find(self, magnitudes: NDArray[Any], start: int) -> NDArray[np.int64]:
        """Places in the tensor of those among some of its entries, in order."""
        return np.flatnonzero(magnitudes == self.number)[: self.wanted] + start

    def settle(self, place: int) -> None:
        """Take note of the place of the last."""
        value = value_of(self.number, self.target.kind)
        self.target.cut = Cut(value, self.name.encode(), place)
