"""The exact k-th magnitude of many entries, without sorting or keeping them.

A sample brackets the threshold; one sweep counts what lies above the bracket and gathers what
lies inside; the answer is checked against the counts and the bracket widened or narrowed until
it is exact. Magnitudes are compared as integers (the bits of a non-negative float are ordered).
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


@dataclass(frozen=True)
class _Found:
    """What one tile holds above and inside the bracket of a search."""

    above: int
    inside: int
    values: NDArray[Any] | None = None
    places: NDArray[Any] | None = None
    counts: NDArray[Any] | None = None
    mask: NDArray[np.uint8] | None = None


@dataclass
class _Target:
    """The search for one threshold: the ``rank``-th largest magnitude of one model."""

    model: int
    rank: int
    low: int
    high: int
    kind: np.dtype[Any]
    capacity: int
    cut: Cut | None = None
    above: int = 0
    inside: int = 0
    kept: list[tuple[bytes, NDArray[Any], NDArray[Any]]] = field(default_factory=list)
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS + 1, np.int64))
    single: bool = False
    narrowed: bool = False
    crowded: bool = False
    known_above: int = 0

    def start_round(self) -> None:
        self.above = self.inside = 0
        self.kept = []
        self.counts = np.zeros(_BINS + 1, np.int64)
        self.single = self.low == self.high and self.narrowed
        self.crowded = False

    @property
    def width(self) -> int:
        """Integers per histogram bin."""
        return (self.high - self.low) // _BINS + 1

    def look(self, magnitudes: NDArray[Any]) -> _Found:
        """Count above the bracket and gather what lies inside; small whatever the data are."""
        top = magnitudes > self.high
        above = int(np.count_nonzero(top))
        inside = magnitudes >= self.low
        np.logical_xor(inside, top, out=inside)
        if self.single:
            # All values are the threshold: which entries they are fits in a bit each.
            return _Found(above, int(np.count_nonzero(inside)), mask=np.packbits(inside))
        places = np.flatnonzero(inside)
        values = magnitudes[places]
        if not self.crowded and 8 * places.size <= magnitudes.size + _BINS:
            return _Found(above, places.size, values, places)
        counts = np.bincount((values - self.low) // self.width, minlength=_BINS + 1)
        return _Found(above, places.size, counts=counts)

    def take(self, name: bytes, start: int, found: _Found) -> None:
        self.above += found.above
        before = self.inside
        self.inside += found.inside
        if found.mask is not None:
            # Only the place of the last tie that stays is missing.
            wanted = self.rank - self.known_above
            if before < wanted <= self.inside:
                places = np.flatnonzero(np.unpackbits(found.mask))
                place = start + int(places[wanted - before - 1])
                self.cut = Cut(self._value(self.low), name, place)
            return
        if found.values is None or found.places is None:
            assert found.counts is not None
            self.counts += found.counts
            self.crowded = True
        else:
            bins = (found.values - self.low) // self.width
            self.counts += np.bincount(bins, minlength=_BINS + 1)
            self.kept.append((name, found.values, found.places + start))
        if self.crowded or self.inside > self.capacity:
            self.crowded, self.kept = True, []

    def _value(self, number: int) -> float:
        return float(np.array([number], self.kind).view(f"f{self.kind.itemsize}")[0])

    def conclude(self) -> None:
        """Settle the threshold, or choose the bracket of the next round."""
        if self.cut is not None:
            return
        if self.rank <= self.above:
            self.low, self.high = self.high + 1, int(np.iinfo(self.kind).max)
        elif self.rank > self.above + self.inside:
            # Zeros are never gathered (the lowest bracket starts at 1): keeping one changes
            # nothing, so a threshold of zero needs no place.
            if self.low <= 1:
                self.cut = Cut(0.0, _LAST)
                return
            self.low, self.high = 1, self.low - 1
        elif not self.crowded:
            self.cut = self._settle()
        else:
            self._narrow()

    def _settle(self) -> Cut:
        values = np.concatenate([v for _, v, _ in self.kept])
        wanted = self.rank - self.above
        threshold = int(np.partition(values, values.size - wanted)[values.size - wanted])
        ties = wanted - int(np.count_nonzero(values > threshold))
        for name, part, places in self.kept:
            equal = places[part == threshold]
            if ties <= equal.size:
                return Cut(self._value(threshold), name, int(equal[ties - 1]))
            ties -= equal.size
        raise AssertionError("unreachable: the wanted rank lies inside the bracket")

    def _narrow(self) -> None:
        above = self.above + np.cumsum(self.counts[::-1])[::-1]
        # The bin of the wanted rank: the highest one with at least `rank` entries from it up.
        chosen = int(np.flatnonzero(above >= self.rank)[-1])
        width = self.width
        self.narrowed = True
        self.known_above = int(above[chosen] - self.counts[chosen])
        bottom = self.low + chosen * width
        self.low, self.high = bottom, min(bottom + width - 1, self.high)


def sample_size(size: int, models: int) -> int:
    """How many entries to sample: the bracket then holds about one entry in a hundred or fewer."""
    return min(max(size // 64, 1 << 16), max((1 << 22) // models, 1 << 16))


def _bracket(ordered: NDArray[Any], rank: int, size: int) -> tuple[int, int]:
    """Integers that hold the threshold with near certainty, from a sample sorted ascending."""
    count = ordered.size
    share = rank / size
    # Sampled in runs, entries are not independent: 8 standard deviations rather than 4.
    spread = 8 * sqrt(count * share * (1 - share)) + 2
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

        def visit(stack: Any, at: Any, pending: list[_Target] = pending) -> list[Any]:
            magnitudes = bits(as_numpy(stack).astype(f"f{pending[0].kind.itemsize}", copy=False))
            return [target.look(magnitudes[target.model]) for target in pending]

        for at, parts in sweep(visit):
            name = at.site.name.encode()
            for target, part in zip(pending, parts, strict=True):
                target.take(name, at.start, part)
        for target in pending:
            target.conclude()
    for (model, place), target in zip(open_places, targets, strict=True):
        found[model][place] = target.cut
    return [[cut for cut in row if cut is not None] for row in found]


def _targets(sweep: Any, wanted: Sequence[tuple[int, int]]) -> list[_Target]:
    capacity = max(CAPACITY // len(wanted), 1 << 16)
    if sweep.size <= capacity:
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
