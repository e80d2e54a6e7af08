"""Shared bases against products of plane rotations, drawn one by one with Python's integers."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from math import ceil, comb, log2

import numpy as np
import pytest

from mergebench.compute.basis import (
    basis_columns,
    column_blocks,
    disjoint_probability,
    drawn_columns,
    expected_shared,
    slot_columns,
    slots,
)
from tests.oracle.drawn import WORD, digest
from tests.oracle.halved import permutation


def word(index: int, *parts: int) -> int:
    """One number of a stream."""
    found = (digest(",".join(map(str, parts))) + (index + 1) * 0x9E3779B97F4A7C15) & WORD
    found = ((found ^ (found >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    found = ((found ^ (found >> 27)) * 0x94D049BB133111EB) & WORD
    return found ^ (found >> 31)


def angle(pair: int, *parts: int) -> tuple[Fraction, Fraction]:
    """Cosine and sine from the first point of the disc, exactly."""
    attempt = 1
    while True:
        x, y = (Fraction(word(2 * pair + one, *parts, attempt) >> 11, 2**52) - 1 for one in (0, 1))
        total = x * x + y * y
        if Fraction(1, 2**40) < total <= 1:
            return (x * x - y * y) / total, 2 * x * y / total
        attempt += 1


def product(width: int, seed: int) -> np.ndarray:
    """All rotations as matrices, multiplied in the longest numbers there are."""
    basis = np.eye(width, dtype=np.longdouble)
    for turn in range(4 * max(1, ceil(log2(width))) if width > 1 else 0):
        order = permutation(width, seed, width, turn, 0)
        for pair in range(width // 2):
            cosine, sine = (float(each) for each in angle(pair, seed, width, turn))
            rotation = np.eye(width, dtype=np.longdouble)
            i, j = order[pair], order[width // 2 + pair]
            rotation[i, i] = rotation[j, j] = cosine
            rotation[i, j], rotation[j, i] = -sine, sine
            basis = rotation @ basis
    return basis


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_basis_is_that_product(width: int, seed: int) -> None:
    """Column by column, also alone and in another order."""
    whole = basis_columns(width, seed, range(width))
    assert np.abs(whole - product(width, seed)).max() < 1e-14
    some = [width - 1, 0][:width]
    assert basis_columns(width, seed, some).tobytes() == whole[:, some].tobytes()


@pytest.mark.parametrize("width", [2, 33, 320, 768])
def test_bases_are_orthonormal_and_spread(width: int) -> None:
    """Columns have length 1, none a product with another; entries look like those of a sphere."""
    basis = basis_columns(width, 0, range(width))
    assert np.abs(basis.T @ basis - np.eye(width)).max() < 1e-13
    narrow = basis.astype(np.float32).astype(np.float64)
    assert np.abs(narrow.T @ narrow - np.eye(width)).max() < 1e-6
    if width > 100:
        # The fourth moment on the sphere is 3 m / (m + 2), with an error of √(96 / m²).
        fourth = float(np.mean((basis * np.sqrt(width)) ** 4))
        assert fourth == pytest.approx(3 * width / (width + 2), abs=6 * 96**0.5 / width)
        assert np.abs(basis).max() < 6 / np.sqrt(width)
        # A Haar matrix has a trace of variance 1.
        assert abs(np.trace(basis)) < 5
        other = basis_columns(width, 1, range(width))
        assert np.abs(basis.T @ other).max() < 6 / np.sqrt(width)


PINNED = [
    "543026be067ec46a42565edd498202b77efd1aa99fc6892abf5db81a1f6f4809",
    "cab10197f635023c9867cd9801511b27832e0d7348d387304fe7e8f7798c5623",
]


def test_the_same_bits_on_any_machine() -> None:
    """Digests of two slices, once and for all."""
    found = [
        hashlib.sha256(basis_columns(width, seed, slot_columns(4, 2)).astype("<f8")).hexdigest()
        for width, seed in ((320, 0), (1280, 12345))
    ]
    assert found == PINNED


def test_slots_share_no_column() -> None:
    """⌊m / r⌋ slots, side by side."""
    for width, rank in ((320, 20), (33, 4), (5, 5), (7, 1)):
        every = [
            column for slot in range(slots(width, rank)) for column in slot_columns(rank, slot)
        ]
        assert every == list(range(width // rank * rank))
    assert slots(3, 4) == 0


def test_blocks_are_all_columns_in_order() -> None:
    """However wide, every column comes once."""
    for width, count in ((1, 1), (4096, 4096), (1 << 20, 9)):
        blocks = list(column_blocks(width, range(count)))
        assert [column for block in blocks for column in block] == list(range(count))
        assert all(len(block) * width <= max(1 << 22, width) for block in blocks)


@pytest.mark.parametrize(
    ("width", "shared", "none"), [(320, 1.25, 0.264), (768, 0.52, 0.586), (1280, 0.31, 0.728)]
)
def test_collisions_of_random_choices(width: int, shared: float, none: float) -> None:
    """Rank 20: r² / m columns on average, and how often none; as drawn choices have it."""
    rank = 20
    assert expected_shared(width, rank) == pytest.approx(shared, abs=0.005)
    assert disjoint_probability(width, rank) == pytest.approx(none, abs=0.0005)
    exact = Fraction(comb(width - rank, rank), comb(width, rank))
    assert disjoint_probability(width, rank) == pytest.approx(float(exact), rel=1e-12)
    rounds = 300
    first = set(drawn_columns(width, rank, 0, 0))
    common = [len(first & set(drawn_columns(width, rank, 0, key))) for key in range(1, rounds + 1)]
    assert np.mean(common) == pytest.approx(expected_shared(width, rank), abs=0.3)
    assert np.mean([each == 0 for each in common]) == pytest.approx(float(exact), abs=0.12)


def test_more_than_half_always_collide() -> None:
    """Two choices of more than half of all columns cannot be disjoint, two of exactly half can."""
    assert disjoint_probability(8, 5) == 0
    assert disjoint_probability(8, 4) == pytest.approx(1 / comb(8, 4))
    assert sorted(drawn_columns(6, 6, 0, 3)) == list(range(6))
