"""Sums and supports of displacements against exact arithmetic, in numpy and in compiled passes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mergebench.compute import supports
from mergebench.compute.entrywise import PIECE, STRETCH, Passes, Room, Rows, passes
from mergebench.compute.objects import Entry
from mergebench.compute.pairwise import as_matrix, every_pair, inner_products
from mergebench.compute.supports import shared_supports
from mergebench.core.delta import Delta, Dense, Difference, LowRank
from mergebench.core.tensor import ArrayTensor

BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = [BF16, F8, np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)]
SIZES = [0, 1, STRETCH - 1, STRETCH, 3 * STRETCH + 5, PIECE + 3]


def compiled() -> Passes:
    """The passes, which must be there."""
    found = passes()
    assert found is not None
    return found


Way = Callable[[], Passes] | None
WAYS = [None, pytest.param(compiled, id="compiled")]


def entries(size: int, dtype: np.dtype, seed: int, scale: float = 1.0) -> np.ndarray:
    """Normal entries, with zeros of both signs among them."""
    values = np.random.default_rng(seed).standard_normal(size) * scale
    values[::7], values[3::11] = 0.0, -0.0
    return values.astype(dtype)


def differences(base: np.ndarray, tuned: list[np.ndarray]) -> tuple[Rows, np.ndarray]:
    """Rows of displacements from one base, and what they hold in float64, the base first."""
    origin = ArrayTensor(base)
    rows = Rows(origin, [Difference(ArrayTensor(each), origin) for each in tuned], base.size)
    wide = base.astype(np.float64)
    return rows, np.stack([wide, *(each.astype(np.float64) - wide for each in tuned)])


def assert_sums(found: np.ndarray, wide: np.ndarray, pairs: list[tuple[int, int]]) -> None:
    """Inner products to a few roundings of the sum of their terms' magnitudes."""
    for value, (one, other) in zip(found.tolist(), pairs, strict=True):
        terms = [Fraction(a) * Fraction(b) for a, b in zip(wide[one], wide[other], strict=True)]
        bound = float(sum(map(abs, terms))) * 1e-13
        assert value == pytest.approx(float(sum(terms)), abs=bound, rel=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES[:-1])
def test_sums_and_signs(way: Way, dtype: np.dtype, size: int) -> None:
    """Every pair, in every dtype, and signs to the last count."""
    tuned = [entries(size, dtype, seed) for seed in (1, 2, 3)]
    rows, wide = differences(entries(size, dtype, 0), tuned)
    pairs, signed = every_pair(4), list(combinations(range(1, 4), 2))

    sums, conflicts = inner_products(rows, pairs, signed, way and way())

    assert_sums(sums, wide, pairs)
    for (one, other), counts in zip(signed, conflicts.tolist(), strict=True):
        product = np.sign(wide[one]) * np.sign(wide[other])
        assert counts == [np.count_nonzero(product < 0), np.count_nonzero(product)]


@pytest.mark.parametrize("way", WAYS)
def test_pieces_add_up(way: Way) -> None:
    """More than one piece, mixed dtypes, and kinds of displacements that are not stored."""
    size = 2 * PIECE + 37
    random = np.random.default_rng(5)
    base, other = ArrayTensor(entries(size, BF16, 0)), ArrayTensor(entries(size, BF16, 9))
    left, right = random.standard_normal((size, 2)), random.standard_normal((2, 1))
    tuned = entries(size, np.dtype(np.float32), 1)
    deltas: list[Delta | None] = [
        Difference(ArrayTensor(tuned), base),
        None,
        Dense(ArrayTensor(entries(size, np.dtype(np.float16), 2))),
        LowRank(ArrayTensor(left), ArrayTensor(right), 0.5, (size, 1)),
        Difference(ArrayTensor(tuned), other),
    ]
    of_base = base.array.astype(np.float64)
    wide = np.stack([
        of_base,
        tuned - of_base,
        np.zeros(size),
        entries(size, np.dtype(np.float16), 2).astype(np.float64),
        0.5 * (left @ right)[:, 0],
        tuned - other.array.astype(np.float64),
    ])  # fmt: skip
    pairs = every_pair(6)

    sums, _ = inner_products(Rows(base, deltas, size), pairs, (), way and way())

    np.testing.assert_allclose(as_matrix(pairs, sums, 6), wide @ wide.T, rtol=1e-11, atol=1e-9)


def test_the_same_signs_of_products_that_underflow() -> None:
    """Two tiny displacements conflict, though their product is zero in float64."""
    zero = np.zeros(2)
    rows, _ = differences(zero, [np.array([1e-300, 5e-324]), np.array([-1e-300, -5e-324])])

    for way in (None, compiled()):
        sums, conflicts = inner_products(rows, [(1, 2)], [(1, 2)], way)
        assert (sums[0], conflicts.tolist()) == (0.0, [[2, 2]])


def test_differences_are_not_rounded() -> None:
    """A base that float32 would lose beside a fine-tuned entry."""
    base = np.array([1e-9, -1e-9], BF16)
    rows, wide = differences(base, [np.array([1.0, 1.0], BF16)])

    for way in (None, compiled()):
        sums, _ = inner_products(rows, [(1, 1)], (), way)
        assert sums[0] == wide[1] @ wide[1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_its_own_sums_alone(way: Way, bad: float) -> None:
    """Sums of other models are what they are."""
    base = entries(600, np.dtype(np.float32), 0)
    tuned = [entries(600, np.dtype(np.float32), seed) for seed in (1, 2)]
    tuned[0][300] = bad
    rows, wide = differences(base, tuned)

    sums, _ = inner_products(rows, [(0, 0), (1, 1), (2, 2)], (), way and way())

    assert not np.isfinite(sums[1])
    assert_sums(sums[[0, 2]], wide, [(0, 0), (2, 2)])


@pytest.mark.parametrize("way", WAYS)
def test_equal_rows_have_a_cosine_of_one(way: Way) -> None:
    """To the bit: an inner product of equal rows is their square."""
    tuned = entries(PIECE + 999, BF16, 1)
    rows, _ = differences(entries(tuned.size, BF16, 0), [tuned, tuned.copy()])

    sums, _ = inner_products(rows, [(1, 1), (1, 2), (2, 2)], (), way and way())

    assert sums[0] == sums[1] == sums[2] > 0


def test_many_rows_take_shorter_pieces() -> None:
    """What a piece of all rows takes is bounded."""
    rows = Rows(None, [None] * 400, 1 << 20)

    spans = list(rows.spans())

    assert spans[0][0] == 0
    assert spans[-1][1] == 1 << 20
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    assert max(stop - start for start, stop in spans) * 400 * 8 <= 1 << 23
    assert Room(rows).raw.nbytes <= 1 << 23


def support(values: np.ndarray, kept: int) -> np.ndarray:
    """The largest magnitudes by a stable sort: the earlier among equals, and never zeros."""
    order = np.argsort(-np.abs(values), kind="stable")[:kept]
    mask = np.zeros(values.size, bool)
    mask[order[values[order] != 0]] = True
    return mask


def assert_supports(wide: np.ndarray, rows: Rows, kept: int, way: Passes | None) -> None:
    """Shared counts, and how many each keeps."""
    masks = [support(each, kept) for each in wide]
    expected = [[int((one & other).sum()) for other in masks] for one in masks]
    assert shared_supports(rows, kept, way).tolist() == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("room", [0, 20, supports.ROOM])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_supports(way: Way, room: int, dtype: np.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many magnitudes lie in the bracket, the same ones are kept."""
    monkeypatch.setattr(supports, "ROOM", room)
    size = PIECE + 301
    tuned = [entries(size, dtype, seed, scale) for seed, scale in ((1, 1.0), (2, 0.1), (3, 5.0))]
    rows, wide = differences(entries(size, dtype, 0), tuned)

    for kept in (1, size // 10, size - 5):
        assert_supports(wide[1:], rows, kept, way and way())


@pytest.mark.parametrize("way", WAYS)
def test_supports_of_ties(way: Way) -> None:
    """Steps of one size, of which only the first may be kept; zeros; and subnormal numbers."""
    random = np.random.default_rng(3)
    steps = random.choice([-0.5, 0.0, 0.5], size=5000)
    rare = np.where(random.random(5000) < 0.01, steps, 0.0)
    tiny = random.integers(-3, 4, 5000) * 5e-324
    wide = np.stack([steps, -steps, rare, tiny, np.zeros(5000)])
    rows = Rows(None, [Dense(ArrayTensor(each)) for each in wide], 5000)

    for kept in (1, 250, 3000, 5000):
        assert_supports(wide, rows, kept, way and way())


@pytest.mark.parametrize("way", WAYS)
def test_supports_by_hand(way: Way) -> None:
    """3 and -3 tie with the last 3: the earlier two are kept."""
    one, other = np.array([3.0, -3.0, 0.0, 1.0, -5.0, 3.0]), np.array([0.0, 2.0, 0, 0, 0, 1.0])
    rows = Rows(None, [Dense(ArrayTensor(one)), Dense(ArrayTensor(other))], 6)

    assert shared_supports(rows, 3, way and way()).tolist() == [[3, 1], [1, 2]]
    assert shared_supports(rows, 6, way and way()).tolist() == [[5, 2], [2, 2]]


def test_all_passes_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is kept says nothing about the others, in the middle of which it is too late."""
    real = Entry.__call__

    def without(entry: Entry, *given: Any) -> int:
        if entry.name == "settle":
            raise ImportError("no compiler here")
        return real(entry, *given)

    monkeypatch.setattr(Entry, "__call__", without)
    passes.cache_clear()
    assert passes() is None
    passes.cache_clear()
