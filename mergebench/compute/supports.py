"""How far several displacements change the same entries most: exact, and without a copy of them.

Magnitudes are looked at as integers of 64 bits, which are ordered as they are. Counts of their
leading 16 bits, and where too many are left of the next 16, bracket the k-th largest; what lies in
the bracket is gathered and sorted out. A last reading counts what several keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.entrywise import SIZE, STRETCH, Passes, Room, Rows

#: Bits below the digits that are counted, one digit after the other.
_SHIFTS = (48, 32, 16, 0)
_DIGITS = 1 << 16
#: Magnitudes that are gathered of a row, at most.
ROOM = 1 << 19


@dataclass(eq=False)
class _Search:
    """The k-th largest magnitude of one row, as far as it is known.

    Attributes
    ----------
    rank : int
        How many of those in the bracket are kept; 0 where the threshold is known.
    level : int
        Digits that are known.
    prefix : int
        These digits.
    gather : bool
        Whether the bracket is small enough.
    threshold, left : int
        What is above is kept, and the first ``left`` of what is at it.
    """

    rank: int
    level: int = 0
    prefix: int = 0
    gather: bool = False
    threshold: int = 0
    left: int = 0
    done: bool = False

    @property
    def mode(self) -> int:
        """Nothing, count or gather."""
        return 0 if self.done else 2 if self.gather else 1

    @property
    def shift(self) -> int:
        """Bits below what is looked at."""
        return _SHIFTS[self.level - 1 if self.gather or self.done else self.level]

    def counted(self, counts: NDArray[np.int64], nonzero: int, lower: int) -> None:
        """Take the digit in which the magnitude lies."""
        if self.level == 0 and nonzero <= self.rank:
            # Zeros are never kept.
            self.level, self.done = 1, True
            return
        above = np.cumsum(counts[::-1])
        place = int(np.searchsorted(above, self.rank))
        digit = _DIGITS - 1 - place
        inside = int(counts[digit])
        self.rank -= int(above[place]) - inside
        self.prefix = self.prefix << 16 | digit
        shift = _SHIFTS[self.level]
        self.level += 1
        if lower == 0:
            self.threshold, self.left, self.done = self.prefix << shift, self.rank, True
        self.gather = inside <= ROOM

    def gathered(self, values: NDArray[np.uint64]) -> None:
        """Take the magnitude itself."""
        place = values.size - self.rank
        ordered = np.partition(values, place)
        self.threshold = int(ordered[place])
        self.left = self.rank - int(np.count_nonzero(values > ordered[place]))
        self.done = True


def shared_supports(rows: Rows, kept: int, passes: Passes | None = None) -> NDArray[np.int64]:
    """``|Aᵢ ∩ Aⱼ|``, where Aᵢ holds the ``kept`` largest magnitudes of displacement i.

    Zeros are never among them, and of equal magnitudes the earlier are. Inputs are read three to
    six times.

    Parameters
    ----------
    rows : Rows
        Of finite entries.
    kept : int
        At least 1.
    passes : Passes, optional
        Compiled passes; numpy without, with the same result.

    Returns
    -------
    int64 array, (models, models)
        The diagonal has how many each keeps.
    """
    models = len(rows.deltas)
    searches = [_Search(kept) for _ in range(models)]
    room = None if passes is None else Room(rows)
    while not all(each.done for each in searches):
        _look(rows, searches, passes, room)
    thresholds = np.array([each.threshold for each in searches], np.uint64)
    left = np.array([each.left for each in searches], np.int64)
    shared = np.zeros((models, models), np.int64)
    flags = np.empty((models, STRETCH), np.uint8)
    for start, stop in rows.spans():
        if passes is not None and room is not None:
            given = room.read(start, stop)
            passes.settle(*given, rows.first, thresholds, left, flags, shared)
            continue
        keys = _keys(rows, start, stop)
        mask = keys > thresholds[:, None]
        for model in range(models):
            ties = np.flatnonzero(keys[model] == thresholds[model])[: left[model]]
            mask[model, ties] = True
            left[model] -= ties.size
        for one in range(models):
            for other in range(one, models):
                shared[one, other] += np.count_nonzero(mask[one] & mask[other])
    upper = np.triu(shared, 1)
    return np.asarray(upper + upper.T + np.diag(np.diagonal(shared)))


def _keys(rows: Rows, start: int, stop: int) -> NDArray[np.uint64]:
    found: NDArray[np.uint64] = rows.wide(start, stop)[rows.first :].view(np.uint64) & SIZE
    return found


def _look(rows: Rows, searches: list[_Search], passes: Passes | None, room: Room | None) -> None:
    """One reading: every search counts the next digit, or gathers."""
    models = len(searches)
    modes = np.array([each.mode for each in searches])
    shifts = np.array([each.shift for each in searches], np.uint64)
    prefixes = np.array([each.prefix for each in searches], np.uint64)
    counts = np.zeros((models, _DIGITS if (modes == 1).any() else 1), np.int64)
    nonzero, filled = np.zeros(models, np.int64), np.zeros(models, np.int64)
    lower = np.zeros(models, np.uint64)
    values = np.empty((models, ROOM if (modes == 2).any() else 0), np.uint64)
    for start, stop in rows.spans():
        if passes is not None and room is not None:
            given = room.read(start, stop)
            passes.tally(*given, rows.first, modes, shifts, prefixes, counts, nonzero, lower,
                         values, filled)  # fmt: skip
            continue
        keys = _keys(rows, start, stop)
        for model, (own, mode) in enumerate(zip(keys, modes, strict=True)):
            high = own >> shifts[model]
            if mode == 1:
                nonzero[model] += np.count_nonzero(own)
                inside = high >> np.uint64(16) == prefixes[model]
                digits = (high[inside] & np.uint64(_DIGITS - 1)).astype(np.int64)
                counts[model] += np.bincount(digits, minlength=_DIGITS)
                rest = own[inside] & ((np.uint64(1) << shifts[model]) - np.uint64(1))
                lower[model] |= np.bitwise_or.reduce(rest, initial=np.uint64(0))
            elif mode == 2:
                some = own[high == prefixes[model]]
                values[model, filled[model] : filled[model] + some.size] = some
                filled[model] += some.size
    for model, each in enumerate(searches):
        if each.mode == 1:
            each.counted(counts[model], int(nonzero[model]), int(lower[model]))
        elif each.mode == 2:
            each.gathered(values[model, : filled[model]])
