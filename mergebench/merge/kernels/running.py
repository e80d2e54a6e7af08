"""Reading stored entries, and running the compiled pass on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.linking import Held
from mergebench.compute.spare import Spare
from mergebench.core.delta import tile
from mergebench.core.tensor import Array, read_into, read_runs
from mergebench.merge.kernels import codes as c
from mergebench.merge.kernels.program import Program
from mergebench.merge.kernels.stored import Stored

_F32 = np.dtype(np.float32)
#: The part of a tile that may lie inside a bracket until it is looked at again.
_FEW = 16
_NO_STACK = np.empty((1, 0), np.float32)
_NO_HALVES = np.empty(0, np.uint16)
#: What a measurement takes, where it is another that needs it.
_NOTHING: Mapping[str, Held] = {
    "weights": Held(np.empty(0, np.float32)),
    "brackets": Held(np.empty((0, 3), np.int64)),
    "tallies": Held(np.empty((0, 4), np.int64)),
    "values": Held(np.empty((0, 0), np.int32)),
    "places": Held(np.empty((0, 0), np.int64)),
    "wide": Held(np.empty((0, 0))),
    "lanes": Held(np.empty((0, 0))),
    "sums": Held(np.empty((0, 0))),
}


class Along(NamedTuple):
    """What stages of rows need beside what all stages do.

    Attributes
    ----------
    length : int
        Entries of a row.
    chances : float64 array, (stages, models, 2)
        See :class:`~mergebench.merge.kernels.program.Program`.
    hints : int64 array, (stages, models, 2, 2)
        Where thresholds of the row before were, which changes no result.
    sizes : int64 array
        Room for a short row.
    places, counts, pairs : uint32 and uint64 array
        Room to rank a row.
    """

    length: int
    chances: NDArray[np.float64]
    hints: NDArray[np.int64]
    sizes: NDArray[np.int64]
    places: NDArray[np.uint32]
    counts: NDArray[np.uint32]
    pairs: NDArray[np.uint64]


class Kernels(NamedTuple):
    """The compiled passes."""

    combine: Callable[..., int]
    measure: Callable[..., int]


class Buffers:
    """Room for one worker: stored entries of a tile, and the workspace of the compiled pass."""

    def __init__(
        self, source: Stored, tile_: int, programs: Sequence[Program], spare: Spare
    ) -> None:
        self.source, self._spare = source, spare
        size, rows = -(-tile_ * source.width // 8) * 8, len(source.rows)
        self._block = spare.take(rows * size)
        self.raw = self._block[: rows * size].reshape(rows, size)
        self.halves, self.words = self.raw.view(np.uint16), self.raw.view(np.uint32)
        row = max((each.row for each in programs), default=0)
        wide = max(c.STRETCH, row)
        self.work = np.empty((source.models + c.SPARE, wide), np.float32)
        self.numbers = np.empty(wide // 2 + 2, np.uint64)
        self.span = (0, 0)
        stages = max((len(each.codes) for each in programs), default=0)
        self.hints = np.zeros((stages, source.models, 2, 2), np.int64)
        self.sizes = np.empty(c.FEW, np.int64)
        sorted_ = row if any(each.sorts for each in programs) else 0
        self.places = np.empty(sorted_, np.uint32)
        self.counts = np.empty(max(sorted_ + 1, c.DIGITS) if sorted_ else 0, np.uint32)
        self.pairs = np.empty((2, sorted_), np.uint64)
        self._inside: tuple[NDArray[np.int32], NDArray[np.int64]] | None = None
        self._rows = Held(self.halves, self.words)
        self._room: dict[Program, Held] = {}

    def close(self, *, keep: bool = True) -> None:
        """Give the room back, or let go of it; nothing may look at it any more."""
        if keep:
            self._spare.give(self._block)

    def read(self, start: int, stop: int) -> None:
        """Read entries ``start:stop`` of every row."""
        self._fill([(start, stop)])
        self.span = start, stop

    def gather(self, spans: Sequence[tuple[int, int]]) -> None:
        """Read runs of entries of every row, one after the other."""
        self._fill(spans)
        self.span = 0, sum(stop - start for start, stop in spans)

    def _fill(self, spans: Sequence[tuple[int, int]]) -> None:
        for target, row, own in zip(self.raw, self.source.rows, self.source.computed, strict=True):
            if row is not None and len(spans) == 1:
                read_into(row, *spans[0], target)
            elif row is not None:
                read_runs(row, spans, target)
            elif own is not None:
                at = 0
                for start, stop in spans:
                    got = tile(own, start, stop, _F32).view(np.uint8)
                    target[at : at + got.size] = got
                    at += got.size

    def inside(self, searches: int, size: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Room for what lies inside brackets, and for where it is."""
        if self._inside is None or self._inside[0].shape != (searches, size):
            self._inside = (
                np.empty((searches, size), np.int32),
                np.empty((searches, size), np.int64),
            )
        return self._inside

    def arguments(self, steps: Program) -> tuple[Any, ...]:
        """What both passes begin with."""
        start, stop = self.span
        if (room := self._room.get(steps)) is None:
            draws, along = self.numbers.view(np.uint32), self._along(steps)
            room = self._room[steps] = Held(self.work, self.numbers, draws, along)
        return self._rows, self.source.held, start, stop - start, steps.held, room

    def _along(self, steps: Program) -> Along | None:
        if not steps.row:
            return None
        return Along(
            steps.row, steps.chances, self.hints, self.sizes, self.places, self.counts, self.pairs
        )

    def _run(self, kernels: Kernels, steps: Program, kind: int, halves: Any, words: Any) -> bool:
        result: int = kernels.combine(*self.arguments(steps), kind, steps.onto, halves, words)
        return result == c.DONE

    def merge(self, kernels: Kernels, steps: Program, dtype: str, out: Array) -> bool:
        """Write merged entries in a stored dtype; false if an entry is not finite.

        Parameters
        ----------
        out : array of that dtype
        """
        kind = c.KINDS[dtype]
        if kind == c.F32:
            return self._run(kernels, steps, kind, _NO_HALVES, out.reshape(1, -1))
        return self._run(kernels, steps, kind, out.view(np.uint16), _NO_STACK)

    def stack(self, kernels: Kernels, steps: Program) -> Array | None:
        """Entries of every model that is left, float32; ``None`` if one that came is not finite."""
        start, stop = self.span
        found = np.empty((steps.rows, stop - start), np.float32)
        done = self._run(kernels, steps, c.ZEROS, _NO_HALVES, found)
        return found if done else None


@dataclass(frozen=True, eq=False)
class Looking:
    """What visitors of a sweep can ask of stored entries that have been read.

    Every answer is ``None`` if an entry is not finite.
    """

    room: Buffers
    kernels: Kernels
    steps: Program

    def survey(
        self, brackets: Sequence[tuple[int, int, int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]] | None:
        """How entries lie to brackets of magnitudes, each a row, its lower and its upper end.

        Returns
        -------
        int64 array, (brackets, 4)
            How many are above, at the upper end, inside, and at the lower end.
        int32 and int64 array, (brackets, m)
            Those inside, as integers, and their places in the tensor, before what is arbitrary.
        """
        start, stop = self.room.span
        wanted = np.array(brackets, np.int64)
        # Most tiles hold few, for which the same pages do again and again.
        for most in ((stop - start) // _FEW, stop - start):
            tallies = np.zeros((len(brackets), 4), np.int64)
            values, places = self.room.inside(len(brackets), most + c.SOME)
            if not self._measure(
                c.SURVEY, brackets=wanted, tallies=tallies, values=values, places=places
            ):
                return None
            if tallies[:, 2].max() <= most:
                break
        return tallies, values, places

    def products(self) -> NDArray[np.float64] | None:
        """Inner products of all pairs of rows over blocks, (blocks, rows, rows).

        ``None`` too after stages of rows, whose pieces do not end where blocks do.
        """
        if self.steps.row:
            return None
        start, stop = self.room.span
        rows = self.steps.rows
        one, other = _pairs(rows)
        sums = np.empty((-(-(stop - start) // c.BLOCK), len(one)))
        wide, lanes = np.empty((rows, 4 * c.LANES)), np.empty((len(one), c.LANES))
        if not self._measure(c.PRODUCTS, wide=wide, lanes=lanes, sums=sums):
            return None
        found = np.empty((len(sums), rows, rows))
        found[:, one, other] = found[:, other, one] = sums
        return found

    def ballot(self, rule: str, weights: Sequence[float]) -> int | None:
        """How many more entries elect a positive sign than a negative one."""
        tallies = np.zeros((1, 4), np.int64)
        how = (1 if weights else 0) + (2 if rule == "count" else 0)
        shares = np.array(weights or (1.0,), np.float32)
        found = self._measure(c.BALLOT, how=how, weights=shares, tallies=tallies)
        return int(tallies[0, 0]) if found else None

    def _measure(self, what: int, how: int = 0, **given: Array) -> bool:
        arrays = (given.get(name, nothing) for name, nothing in _NOTHING.items())
        begin = self.room.arguments(self.steps)
        return self.kernels.measure(*begin, what, how, *arrays) == c.DONE


@cache
def _pairs(rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.triu_indices(rows)
