"""Shared random orthogonal bases, the same to the last bit on every machine.

A basis of R^m is a product of rounds; a round pairs all coordinates at random and rotates every
pair by a random angle (Kac's walk, run in parallel: M. Kac, *Foundations of kinetic theory*, 1956).
Any column is had alone, by taking one unit vector through all rounds. Sines and cosines come from
points in the unit disc (J. von Neumann, *Various techniques used in connection with random digits*,
1951), so that nothing but additions, multiplications and divisions is computed, which IEEE 754
fixes bit by bit: no LAPACK, no BLAS and no mathematical library has a say, as they would in the QR
decomposition of a Gaussian matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, log2, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.random import stream_of, words

#: Rounds per doubling of the width: one would reach every coordinate, four spread evenly.
_ROUNDS = 4
#: Numbers that are taken through the rounds at once.
_HELD = 1 << 22
_MAGNITUDE = np.uint64(11)

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


def basis_columns(width: int, seed: int, columns: Sequence[int]) -> Floats:
    """Some columns of the basis of R^width that a seed names.

    Parameters
    ----------
    width : int >= 1
        m, the length of a column.
    seed : int
    columns : sequence of int, each in [0, width)

    Returns
    -------
    float64 array, (width, len(columns))
        Orthonormal to 1e-13.
    """
    found = np.zeros((width, len(columns)))
    found[list(columns), range(len(columns))] = 1.0
    for left, right, cosine, sine in _rounds(width, seed):
        one, other = found[left], found[right]
        found[left] = cosine * one - sine * other
        found[right] = sine * one + cosine * other
    return found


def column_blocks(width: int, columns: Sequence[int]) -> Iterator[Sequence[int]]:
    """Columns in groups that take little memory."""
    size = max(1, _HELD // width)
    for start in range(0, len(columns), size):
        yield columns[start : start + size]


def slot_columns(rank: int, slot: int) -> range:
    """The columns of a slot: no two slots of one rank share any."""
    return range(slot * rank, (slot + 1) * rank)


def slots(width: int, rank: int) -> int:
    """How many slots of a rank a basis has: ⌊m / r⌋."""
    return width // rank


def drawn_columns(width: int, rank: int, seed: int, key: int) -> list[int]:
    """A random choice of columns, by a key that nobody else need know of."""
    order = np.argsort(words(stream_of(seed, width, key), 0, width), kind="stable")
    return sorted(int(column) for column in order[:rank])


def expected_shared(width: int, rank: int) -> float:
    """Columns that two independent random choices of ``rank`` share on average: r² / m."""
    return rank * rank / width


def disjoint_probability(width: int, rank: int) -> float:
    """The probability that two independent random choices of ``rank`` columns share none."""
    if 2 * rank > width:
        return 0.0
    return prod((width - rank - taken) / (width - taken) for taken in range(rank))


def _rounds(width: int, seed: int) -> Iterator[tuple[Places, Places, Floats, Floats]]:
    """Pairs of coordinates of every round, and the rotation of each, (pairs, 1)."""
    pairs = width // 2
    for turn in range(_ROUNDS * max(1, ceil(log2(width))) if pairs else 0):
        order = np.argsort(words(stream_of(seed, width, turn, 0), 0, width), kind="stable")
        cosine, sine = _angles(pairs, (seed, width, turn))
        yield order[:pairs], order[pairs : 2 * pairs], cosine[:, None], sine[:, None]


def _angles(count: int, parts: Sequence[int]) -> tuple[Floats, Floats]:
    """Cosines and sines of uniform angles: of twice the angle of a uniform point in the disc."""
    points = np.zeros((count, 2))
    missing = np.arange(count)
    attempt = 0
    while missing.size:
        attempt += 1
        numbers = _uniform(words(stream_of(*parts, attempt), 0, 2 * count)).reshape(count, 2)
        inside = _squares(numbers[missing])
        # Next to the centre digits run out.
        fits = (inside <= 1.0) & (inside > 2.0**-40)
        points[missing[fits]] = numbers[missing[fits]]
        missing = missing[~fits]
    total = _squares(points)
    x, y = points[:, 0], points[:, 1]
    return (x * x - y * y) / total, (2.0 * x * y) / total


def _squares(points: Floats) -> Floats:
    x, y = points[:, 0], points[:, 1]
    found: Floats = x * x + y * y
    return found


def _uniform(bits: NDArray[Any]) -> Floats:
    """Numbers in [-1, 1) with 53 random bits."""
    found: Floats = (bits >> _MAGNITUDE).astype(np.float64) * 2.0**-52 - 1.0
    return found
