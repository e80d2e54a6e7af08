"""Displacements of one tensor side by side, in float64, as compiled passes read them.

Differences of stored entries are exact to float64, whatever the dtypes; what is not stored as it is
(low rank, narrow or computed) is made by :func:`~mergebench.core.delta.tile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.objects import Entry
from mergebench.core.delta import Delta, Dense, Difference, resident, tile
from mergebench.core.tensor import Tensor

#: How entries of a row are stored, where a pass decodes them itself.
ZEROS, BF16, F32, F64 = range(4)
KINDS = {"BF16": BF16, "F32": F32, "F64": F64}
_WIDTHS = (2, 2, 4, 8)
#: Entries of a piece, and bytes that it may take; sums are made of pieces, whatever computes them.
PIECE, _BYTES = 1 << 16, 1 << 23
#: Entries that go through a pass together.
STRETCH = 256
#: Sums that run side by side.
LANES = STRETCH // 4
#: Passes that only sum are worth so many times as many entries: numpy is nearly as fast.
SUMS = 32
#: The bits of a float64 that are its magnitude.
SIZE = np.uint64(0x7FFFFFFFFFFFFFFF)
_WIDE: np.dtype[Any] = np.dtype(np.float64)


class Passes(NamedTuple):
    """The compiled passes, see :mod:`mergebench.compute.entrywise_passes`."""

    add: Callable[..., int]
    tally: Callable[..., int]
    settle: Callable[..., int]


@cache
def passes() -> Passes | None:
    """The compiled passes; ``None`` where nothing can be compiled."""
    where = "mergebench.compute.entrywise_passes"
    found = Passes(*(Entry(where, name) for name in Passes._fields))
    begin = Room(Rows(None, [None], 1)).read(0, 1)
    none: Any = np.zeros((0, 2), np.int64)
    ints, keys = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    table, values = np.zeros((0, 1), np.int64), np.zeros((0, 0), np.uint64)
    try:
        # All of them now: numpy cannot go on with what one of them has begun.
        found.add(*begin, none, np.zeros((0, LANES)), np.zeros(0), none,
                  np.zeros((1, STRETCH), np.int8), none)  # fmt: skip
        found.tally(*begin, 0, ints, keys, keys, table, ints, keys, values, ints)
        found.settle(*begin, 0, keys, ints, np.zeros((0, STRETCH), np.uint8), table)
    except Exception:
        # numpy does the same; compilers fail in more ways than can be named.
        return None
    return found


@dataclass(frozen=True, eq=False)
class Rows:
    """The base, where there is one, and displacements from it, as rows of one matrix.

    Parameters
    ----------
    base : Tensor or None
        The first row.
    deltas : sequence of Delta or None
        The others; ``None`` is zeros.
    size : int
        Entries of the tensor.
    """

    base: Tensor | None
    deltas: Sequence[Delta | None]
    size: int

    def __post_init__(self) -> None:
        held = [None if each is None else resident(each) for each in self.deltas]
        object.__setattr__(self, "deltas", held)

    @property
    def first(self) -> int:
        """The row of the first displacement."""
        return 0 if self.base is None else 1

    @property
    def count(self) -> int:
        """Rows in all."""
        return self.first + len(self.deltas)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Pieces, cut at places that the tensor and the number of rows alone decide."""
        most = _BYTES // (8 * max(self.count, 1)) // STRETCH * STRETCH
        step = max(min(PIECE, most), STRETCH)
        for start in range(0, self.size, step):
            yield start, min(start + step, self.size)

    def wide(self, start: int, stop: int) -> NDArray[np.float64]:
        """Entries ``start:stop`` of every row, float64 (rows, stop - start)."""
        out = np.zeros((self.count, stop - start))
        if self.base is not None:
            out[0] = self.base.read(start, stop).astype(np.float64)
        for row, each in enumerate(self.deltas, self.first):
            if each is None:
                continue
            if isinstance(each, Difference) and each.base is self.base:
                np.subtract(each.finetuned.read(start, stop).astype(np.float64), out[0],
                            out=out[row])  # fmt: skip
            else:
                out[row] = tile(each, start, stop, _WIDE)
        return out


class Room:
    """Stored entries of a piece, and the workspace of a compiled pass; for one thread."""

    def __init__(self, rows: Rows) -> None:
        made: list[Delta | None] = [] if rows.base is None else [Dense(rows.base)]
        self.minus = np.zeros(rows.count, np.bool_)
        for each in rows.deltas:
            if isinstance(each, Difference) and each.base is rows.base:
                self.minus[len(made)] = True
                made.append(Dense(each.finetuned))
            else:
                made.append(each)
        #: What is decoded by a pass, and what comes as float64.
        self._stored = [
            each.values if isinstance(each, Dense) and each.values.dtype in KINDS else None
            for each in made
        ]
        self._made = made
        kinds = [
            ZEROS if delta is None else F64 if stored is None else KINDS[stored.dtype]
            for stored, delta in zip(self._stored, made, strict=True)
        ]
        self.kinds = np.array(kinds, np.int64)
        longest = max((stop - start for start, stop in rows.spans()), default=0)
        width = max((_WIDTHS[kind] for kind in kinds), default=2)
        self.raw = np.empty((rows.count, -(-longest * width // 8) * 8), np.uint8)
        self.views = self.raw.view(np.uint16), self.raw.view(np.uint32), self.raw.view(np.float64)
        self.work = np.empty((rows.count, STRETCH))

    def read(self, start: int, stop: int) -> tuple[Any, ...]:
        """Read entries ``start:stop``; what every pass begins with."""
        for target, stored, delta in zip(self.raw, self._stored, self._made, strict=True):
            if stored is not None:
                found = stored.read(start, stop, target)
            elif delta is not None:
                found = tile(delta, start, stop, _WIDE)
            else:
                continue
            if found.size and found.ctypes.data != target.ctypes.data:
                flat = np.ascontiguousarray(found).reshape(-1)
                target[: flat.nbytes] = flat.view(np.uint8)
        return (*self.views, self.kinds, self.minus, stop - start, self.work)
