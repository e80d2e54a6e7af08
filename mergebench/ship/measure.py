"""Passes over what is packed: sums and thresholds before, errors afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from math import fsum, sqrt
from typing import Any, TypeVar

import numpy as np

from mergebench.adapters_zoo.packing import blocks_of
from mergebench.compute.cut import Cut
from mergebench.compute.select import kth_magnitudes
from mergebench.core.delta import Delta, LowRank, Replacement, factors, tile
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import Array, size_of
from mergebench.ship.pieces import Piece

R = TypeVar("R")
_RUN = 1024


@dataclass(frozen=True)
class Sums:
    """What is known of entries: how many, Σx, Σx², the largest magnitude."""

    count: int
    total: float
    squares: float
    largest: float

    @property
    def mean(self) -> float:
        """Their mean; 0 of none."""
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Their unbiased standard deviation; 0 of fewer than two."""
        if self.count < 2:
            return 0.0
        return sqrt(max(self.squares - self.total**2 / self.count, 0.0) / (self.count - 1))


def together(sums: Iterable[Sums]) -> Sums:
    """Sums over several tensors."""
    each = list(sums)
    return Sums(
        sum(one.count for one in each),
        fsum(one.total for one in each),
        fsum(one.squares for one in each),
        max((one.largest for one in each), default=0.0),
    )


def in_order(pool: Executor, jobs: Iterable[Callable[[], R]], ahead: int = 8) -> Iterator[R]:
    """Results of jobs in their order, a few of them under way at a time."""
    window: deque[Future[R]] = deque()
    try:
        for job in jobs:
            window.append(pool.submit(job))
            if len(window) > ahead:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        for future in window:
            future.cancel()


def measure(
    label: str, pieces: Sequence[Piece], pool: Executor, step: Callable[[int], None]
) -> dict[str, Sums]:
    """Sums of every piece, whatever the number of threads.

    Raises
    ------
    MergebenchError
        If an entry is NaN or infinite.
    """

    def job(piece: Piece, start: int, stop: int) -> tuple[str, Sums]:
        values = piece.read(start, stop).astype(np.float64, copy=False)
        squares = float(np.dot(values, values))
        if not np.isfinite(squares) and not np.isfinite(values).all():
            raise MergebenchError(
                f"{label}: tensor {piece.name!r} has entries that are NaN or infinite",
                fix="repair the input, or leave the tensor out with --exclude",
            )
        largest = float(np.abs(values).max(initial=0.0))
        return piece.name, Sums(values.size, float(values.sum()), squares, largest)

    found: dict[str, list[Sums]] = {piece.name: [] for piece in pieces}
    jobs = (
        partial(job, piece, start, stop)
        for piece in pieces
        for start, stop in blocks_of(piece.size)
    )
    for name, sums in in_order(pool, jobs):
        found[name].append(sums)
        step(sums.count)
    return {name: together(each) for name, each in found.items()}


@dataclass(frozen=True)
class _Site:
    name: str


@dataclass(frozen=True)
class _At:
    site: _Site
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class _Sweep:
    """All entries of some pieces, by falling magnitude of none: as thresholds are searched."""

    pieces: Sequence[Piece]
    pool: Executor
    step: Callable[[int], None]
    models: int = 1

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def __call__(self, visit: Callable[[Any, Any], R]) -> Iterator[tuple[_At, R]]:
        def job(piece: Piece, start: int, stop: int) -> tuple[_At, R]:
            at = _At(_Site(piece.name), start, stop)
            return at, visit(piece.read(start, stop)[None], at)

        jobs = (
            partial(job, piece, start, stop)
            for piece in self.pieces
            for start, stop in blocks_of(piece.size)
        )
        for at, found in in_order(self.pool, jobs):
            self.step(at.stop - at.start)
            yield at, found

    def sample(self, count: int) -> Array:
        runs = max(count // _RUN, 1)
        stride = max(self.size / runs, 1.0)
        parts, offset, wanted = [], 0, 0.0
        for piece in self.pieces:
            while wanted < offset + piece.size:
                begin = int(wanted - offset)
                parts.append(piece.read(begin, min(begin + _RUN, piece.size)))
                wanted += stride
            offset += piece.size
        return np.concatenate(parts)[None]


def in_name_order(pieces: Iterable[Piece]) -> list[Piece]:
    """As thresholds order equals."""
    return sorted(pieces, key=lambda piece: piece.name.encode())


def cut_of(pieces: Sequence[Piece], rank: int, pool: Executor, step: Callable[[int], None]) -> Cut:
    """What keeps exactly the ``rank`` largest magnitudes."""
    return kth_magnitudes(_Sweep(in_name_order(pieces), pool, step), [[rank]])[0][0]


def sample_of(pieces: Sequence[Piece], count: int, pool: Executor) -> Array:
    """Some entries of all pieces, evenly spread, shape (m,)."""
    found: Array = _Sweep(in_name_order(pieces), pool, lambda _: None).sample(count)[0]
    return found


@dataclass(frozen=True)
class Error:
    """How far a tensor is from what it was: squared norms and the inner product."""

    apart: float
    own: float
    other: float
    inner: float
    entries: int = 0

    @property
    def relative(self) -> float:
        """``‖x - x̂‖ / ‖x‖``; 0 where both are zero."""
        if self.own > 0:
            return sqrt(max(self.apart, 0.0) / self.own)
        return 0.0 if self.apart <= 0 else float("inf")

    @property
    def cosine(self) -> float | None:
        """Between both; ``None`` where one is zero."""
        if self.own <= 0 or self.other <= 0:
            return None
        return self.inner / sqrt(self.own * self.other)


def summed(errors: Iterable[Error]) -> Error:
    """The error of several tensors as one."""
    each = list(errors)
    return Error(
        fsum(one.apart for one in each),
        fsum(one.own for one in each),
        fsum(one.other for one in each),
        fsum(one.inner for one in each),
        sum(one.entries for one in each),
    )


def error_of(before: Delta, after: Delta) -> Error | None:
    """How far a displacement is from what it was; ``None`` for new values.

    Products of factors are compared through the Gram matrices of their factors.
    """
    size = size_of(before.shape)
    if isinstance(before, Replacement) or isinstance(after, Replacement):
        return None
    wide = np.dtype(np.float64)
    if isinstance(before, LowRank) and isinstance(after, LowRank):
        (B, A), (D, C) = factors(before, wide), factors(after, wide)
        # The difference is the product of factors side by side: no cancellation of large sums.
        left, right = np.concatenate([B, -D], axis=1), np.concatenate([A, C])
        return Error(
            max(_inner(left, right, left, right), 0.0),
            _inner(B, A, B, A),
            _inner(D, C, D, C),
            _inner(B, A, D, C),
            size,
        )
    sums = np.zeros(4)
    for start, stop in blocks_of(size):
        one, two = tile(before, start, stop, wide), tile(after, start, stop, wide)
        gap = one - two
        sums += [gap @ gap, one @ one, two @ two, one @ two]
    apart, own, other, inner = (float(each) for each in sums)
    return Error(apart, own, other, inner, size)


def _inner(B: Array, A: Array, D: Array, C: Array) -> float:
    return float(((B.T @ D) * (A @ C.T)).sum())


def errors_of(before: Mapping[str, Delta], after: Mapping[str, Delta]) -> dict[str, Error]:
    """Of every displacement that both have."""
    found = {}
    for name, delta in before.items():
        if name in after and (error := error_of(delta, after[name])) is not None:
            found[name] = error
    return found
