"""The exact k-th magnitude of many entries, without sorting or keeping them.

A sample brackets the threshold; one sweep counts what lies above the bracket and at its ends, and
gathers what lies inside; the answer is checked against the counts and the bracket widened or
narrowed until it is exact. Magnitudes are compared as integers (the bits of a non-negative float
are ordered).
Ties are broken by (tensor name as bytes, flat index), so *exactly* k entries are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.core.tensor import Array

#: Entries gathered, over all thresholds, before brackets are narrowed instead. An entry takes
#: 12 bytes (16 in float64), so a search stays below 64 MiB.
CAPACITY = 1 << 22
_BINS = 1 << 12


@dataclass(frozen=True)
class Cut:
    """A threshold on magnitudes with its tie rule.

    An entry stays if ``|x| > value``, or if ``|x| == value`` and its place is not after
    ``(name, index)``.
    """

    value: float
    name: bytes = b""
    index: int = -1

    def ties_until(self, name: str, start: int, stop: int) -> int:
        """How many of the entries ``start:stop`` of a tensor stand at or before the cut."""
        here = name.encode()
        if here != self.name:
            return stop - start if here < self.name else 0
        return min(max(self.index + 1 - start, 0), stop - start)


#: Keeps everything, and nothing.
ALL, NONE = Cut(-1.0), Cut(float("inf"))
_LAST = b"\xff" * 8


def bits(stack: Array) -> NDArray[Any]:
    """Magnitudes as ordered non-negative integers, same shape."""
    kind = np.dtype(f"i{stack.dtype.itemsize}")
    return stack.view(kind) & np.iinfo(kind).max


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
class _Target:
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
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS + 1, np.int64))
    crowded: bool = False
    #: Per tile where it is, and how many of its entries are at the upper and at the lower end.
    ends: list[tuple[str, int, int, int, int]] = field(default_factory=list)

    def start_round(self) -> None:
        self.above = self.upper = self.inside = self.lower = 0
        self.kept, self.ends = [], []
        self.counts = np.zeros(_BINS + 1, np.int64)
        self.crowded = False

    @property
    def width(self) -> int:
        """Integers per histogram bin."""
        return (self.high - self.low) // _BINS + 1

    def room(self, size: int) -> int:
        """How many entries of a tile of a size are gathered; more are only counted."""
        return 0 if self.crowded else size // 8 + _BINS

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
        return np.bincount((values - self.low) // self.width, minlength=_BINS + 1)

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
        counts = sum((self.binned(each) for each in found), np.zeros(_BINS + 1, np.int64))
        return Found(above, upper, inside, lower, counts=counts, ends=ends)

    def take(self, at: Any, found: Found) -> None:
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

    def _value(self, number: int) -> float:
        return float(np.array([number], self.kind).view(f"f{self.kind.itemsize}")[0])

    def conclude(self) -> _Tie | None:
        """Settle the threshold, say which of its ties is the last, or choose another bracket."""
        to_upper = self.above + self.upper
        to_inside = to_upper + self.inside
        if self.rank <= self.above:
            self.low, self.high = self.high + 1, int(np.iinfo(self.kind).max)
        elif self.rank <= to_upper:
            return self._tie(self.high, self.rank - self.above, 0)
        elif self.rank <= to_inside and self.crowded:
            self._narrow(to_upper)
        elif self.rank <= to_inside:
            self.cut = self._settle(to_upper)
        elif self.rank <= to_inside + self.lower:
            return self._tie(self.low, self.rank - to_inside, 1)
        # Zeros are never gathered (the lowest bracket starts at 1): keeping one changes nothing,
        # so a threshold of zero needs no place.
        elif self.low <= 1:
            self.cut = Cut(0.0, _LAST)
        else:
            self.low, self.high = 1, self.low - 1
        return None

    def _tie(self, number: int, wanted: int, end: int) -> _Tie:
        for name, start, stop, *ties in self.ends:
            if wanted <= ties[end]:
                return _Tie(self, name, start, stop, number, wanted)
            wanted -= ties[end]
        raise AssertionError("unreachable: the wanted rank lies at an end of the bracket")

    def _settle(self, above: int) -> Cut:
        values = np.concatenate([v for _, v, _ in self.kept])
        wanted = self.rank - above
        threshold = int(np.partition(values, values.size - wanted)[values.size - wanted])
        ties = wanted - int(np.count_nonzero(values > threshold))
        for name, part, places in self.kept:
            equal = places[part == threshold]
            if ties <= equal.size:
                return Cut(self._value(threshold), name, int(equal[ties - 1]))
            ties -= equal.size
        raise AssertionError("unreachable: the wanted rank lies inside the bracket")

    def _narrow(self, to_upper: int) -> None:
        above = to_upper + np.cumsum(self.counts[::-1])[::-1]
        # The bin of the wanted rank: the highest one with at least `rank` entries from it up.
        chosen = int(np.flatnonzero(above >= self.rank)[-1])
        width = self.width
        bottom = self.low + chosen * width
        self.low, self.high = bottom, min(bottom + width - 1, self.high)


@dataclass(frozen=True)
class _Tie:
    """Entries that equal a threshold: the last one that stays is the ``wanted``-th of a tile."""

    target: _Target
    name: str
    start: int
    stop: int
    number: int
    wanted: int

    def find(self, magnitudes: NDArray[Any], start: int) -> int:
        """Its place in the tensor."""
        equal = np.flatnonzero(magnitudes == self.number)
        return int(equal[self.wanted - 1]) + start

    def settle(self, place: int) -> None:
        """Take note of the place of the last."""
        value = self.target._value(self.number)
        self.target.cut = Cut(value, self.name.encode(), place)


@dataclass(frozen=True)
class _Survey:
    """Looks at tiles for several searches at once, in a sweep over ``size`` entries."""

    pending: Sequence[_Target]
    size: int

    def __call__(self, stack: Any, at: Any) -> list[Found]:
        magnitudes = _magnitudes(stack, self.pending[0].kind)
        return [each.look(magnitudes[each.model], at.start) for each in self.pending]

    def fold(self, parts: Sequence[tuple[int, int, list[Found]]]) -> list[Found]:
        """What runs of tiles of one tensor hold together."""
        length = parts[-1][1] - parts[0][0]
        rooms = [4 * each.capacity * length // self.size + _BINS for each in self.pending]
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
class _Locate:
    """Finds ties in the tiles that hold them; other tiles are passed over."""

    ties: Sequence[_Tie]

    def __call__(self, stack: Any, at: Any) -> list[tuple[int, int]]:
        here = [
            (number, each)
            for number, each in enumerate(self.ties)
            if each.name == at.site.name and each.start == at.start
        ]
        if not here:
            return []
        magnitudes = _magnitudes(stack, self.ties[0].target.kind)
        return [
            (number, each.find(magnitudes[each.target.model], at.start)) for number, each in here
        ]


def _magnitudes(stack: Any, kind: np.dtype[Any]) -> NDArray[Any]:
    return bits(as_numpy(stack).astype(f"f{kind.itemsize}", copy=False))


def sample_size(size: int, models: int) -> int:
    """How many entries to sample: the bracket then holds about one entry in a hundred or fewer."""
    return min(max(size // 256, 1 << 16), max((1 << 22) // models, 1 << 16))


def _bracket(ordered: NDArray[Any], rank: int, size: int) -> tuple[int, int]:
    """Integers that hold the threshold with near certainty, from a sample sorted ascending."""
    count = ordered.size
    share = rank / size
    # Sampled in runs, entries are not independent: 6 standard deviations rather than 4.
    spread = 6 * sqrt(count * share * (1 - share)) + 2
    highest, lowest = floor(share * count - spread), ceil(share * count + spread)
    high = int(ordered[count - highest]) if highest > 0 else int(np.iinfo(ordered.dtype).max)
    low = int(ordered[count - lowest]) if lowest <= count else 1
    return max(low, 1), max(high, low, 1)


def kth_magnitudes(sweep: Any, ranks: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """For every model, the cuts that keep exactly its ``rank`` largest magnitudes.

    Parameters
    ----------
    sweep : Sweep
        Gives stacks of shape ``(models, m)``, float32 or float64, without NaN.
    ranks : sequence per model of int
        How many entries to keep; 0 keeps none, the size of the scope or more keeps all.

    Returns
    -------
    list per model of Cut, in the order of ``ranks``
    """
    size = sweep.size
    found: list[list[Cut | None]] = [
        [NONE if rank <= 0 else ALL if rank >= size else None for rank in each] for each in ranks
    ]
    open_places = [
        (model, place)
        for model, row in enumerate(found)
        for place, cut in enumerate(row)
        if cut is None
    ]
    if not open_places:
        return [[cut for cut in row if cut is not None] for row in found]
    targets = _targets(sweep, [(model, ranks[model][place]) for model, place in open_places])
    while pending := [target for target in targets if target.cut is None]:
        for target in pending:
            target.start_round()
        for at, parts in sweep(_Survey(pending, size)):
            for target, part in zip(pending, parts, strict=True):
                target.take(at, part)
        ties = [tie for target in pending if (tie := target.conclude()) is not None]
        if ties:
            _settle(sweep, ties)
    for (model, place), target in zip(open_places, targets, strict=True):
        found[model][place] = target.cut
    return [[cut for cut in row if cut is not None] for row in found]


def _settle(sweep: Any, ties: Sequence[_Tie]) -> None:
    spans = {(each.name, each.start, each.stop) for each in ties}
    # Sweeps that cannot look at single tiles again look at all of them.
    again = getattr(sweep, "again", None)
    looked = sweep(_Locate(ties)) if again is None else again(_Locate(ties), spans)
    for _, found in looked:
        for number, place in found:
            ties[number].settle(place)


def _targets(sweep: Any, wanted: Sequence[tuple[int, int]]) -> list[_Target]:
    capacity = max(CAPACITY // len(wanted), 1 << 16)
    if sweep.size <= _BINS:
        # Small enough to be gathered whole.
        kind = bits(as_numpy(sweep.sample(1))).dtype
        top = int(np.iinfo(kind).max)
        return [_Target(model, rank, 1, top, kind, capacity) for model, rank in wanted]
    ordered = np.sort(bits(as_numpy(sweep.sample(sample_size(sweep.size, sweep.models)))), axis=-1)
    return [
        _Target(model, rank, *_bracket(ordered[model], rank, sweep.size), ordered.dtype, capacity)
        for model, rank in wanted
    ]


def as_numpy(stack: Any) -> Array:
    """A host numpy view or copy of an array of any library, cut off from autograd."""
    if hasattr(stack, "detach"):
        stack = stack.detach().cpu()
        # numpy has no bfloat16 of its own; float32 holds its numbers as they are.
        stack = stack.float() if stack.dtype.itemsize < 4 else stack
    array = np.asarray(stack)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array
