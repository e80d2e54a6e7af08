"""Concatenated factors in the dtype that is written: each number is rounded once, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergebench.core.delta import LowRank
from mergebench.core.errors import MergebenchError
from mergebench.core.site import Site
from mergebench.core.tensor import DTYPES, Array, ArrayTensor
from mergebench.merge.chains import chain
from mergebench.merge.item import Item
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh
from mergebench.merge.stacked import stacked

OPS = chain(weigh(), sum_(), scale(0.5))
SHAPE = (5, 7)
SCALES = (1.0, -4.0, 0.3, 2.0**-140, 2.0**120)


def low_rank(B: Array, A: Array, scale_of: float) -> LowRank:
    """An update of the shape above."""
    return LowRank(ArrayTensor(B), ArrayTensor(A), scale_of, SHAPE)


def item_of(deltas: list[LowRank | None], weights: list[float]) -> Item:
    """One tensor of as many models."""
    names = tuple(f"m{number}" for number in range(len(deltas)))
    places = tuple(range(len(deltas)))
    return Item(Site("x.weight", SHAPE), tuple(deltas), tuple(weights), names, None, places=places)


def drawn(seed: int, rank: int, dtype: str, spread: int) -> tuple[Array, Array]:
    """Factors of numbers as large and as small as asked for, some of them 0."""
    random = np.random.default_rng(seed)

    def one(shape: tuple[int, int]) -> Array:
        powers = random.integers(-spread, spread + 1, shape)
        values = random.standard_normal(shape) * 2.0**powers * (random.random(shape) > 0.2)
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(DTYPES[dtype])

    return one((SHAPE[0], rank)), one((rank, SHAPE[1]))


def rounded(exact: Array, dtype: str) -> Array:
    """Nearest numbers of a dtype, ties to even, found among its neighbours."""
    target: np.dtype[Any] = DTYPES[dtype]
    near = exact.astype(np.float32).astype(target) if dtype == "BF16" else exact.astype(target)
    if dtype != "BF16":
        return near
    bits = near.view(np.int16).astype(np.int32)
    best = near.astype(np.float64)
    for step in (-1, 1):
        other = (bits + step).astype(np.int16).view(target).astype(np.float64)
        closer = np.abs(other - exact) < np.abs(best - exact)
        even = (np.abs(other - exact) == np.abs(best - exact)) & ((bits + step) % 2 == 0)
        best = np.where(np.isfinite(other) & (closer | even), other, best)
    return np.where(np.isfinite(near.astype(np.float64)), best, near).astype(target)


@given(
    st.integers(0, 99),
    st.sampled_from(["BF16", "F16", "F32"]),
    st.sampled_from(["BF16", "F16", "F32"]),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(SCALES)), min_size=1, max_size=3),
    st.sampled_from([1.0, 2.0, 0.7]),
    st.integers(0, 2),
    st.sampled_from([1, 12, 125]),
)
def test_every_number_is_rounded_once(
    seed: int,
    stored: str,
    written: str,
    adapters: list[tuple[int, float]],
    weight: float,
    padding: int,
    spread: int,
) -> None:
    """B times weight, λ and scale, A as it is, zeros behind; what does not fit is an error."""
    pairs = [drawn(seed + n, rank, stored, spread) for n, (rank, _) in enumerate(adapters)]
    scales = [each for _, each in adapters]
    kept = [np.isfinite(np.concatenate([b.ravel(), a.ravel()]).astype("f8")) for b, a in pairs]
    deltas = [low_rank(b, a, s) for (b, a), s in zip(pairs, scales, strict=True)]
    rank = sum(each for each, _ in adapters) + padding
    lefts = [b.astype("f8") * (0.5 * weight * s) for (b, _), s in zip(pairs, scales, strict=True)]
    rights = [a.astype("f8") for _, a in pairs]
    exact = np.concatenate(lefts, 1), np.concatenate(rights, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = [rounded(each, written) for each in exact]
    fits = all(np.isfinite(each.astype("f8")).all() for each in wanted)
    item = item_of([None, *deltas], [1.0] + [weight] * len(deltas))
    if not fits or not all(each.all() for each in kept):
        with pytest.raises(MergebenchError, match=r"x\.weight"):
            stacked(OPS, item, rank, written, "x.weight")
        return
    left, right = stacked(OPS, item, rank, written, "x.weight")

    assert (left.shape, right.shape) == ((SHAPE[0], rank), (rank, SHAPE[1]))
    assert left.dtype == right.dtype == DTYPES[written]
    whole = rank - padding
    assert not left[:, whole:].any()
    assert not right[whole:].any()
    for got, expected in ((left[:, :whole], wanted[0]), (right[:whole], wanted[1])):
        assert np.array_equal(got.astype("f8"), expected.astype("f8"))


def test_inputs_stay_as_they_are() -> None:
    """Also where their bits are moved."""
    b, a = drawn(1, 2, "BF16", 1)
    b.flags.writeable = a.flags.writeable = False
    stacked(OPS, item_of([low_rank(b, a, 8.0)], [1.0]), 2, "BF16", "x.weight")


def test_halves_of_the_smallest_numbers_are_rounded() -> None:
    """Below 2⁻¹²⁶ a bfloat16 has fewer digits, so that moving the exponent is not enough."""
    values = np.array([1.0, 1 + 2**-7, 1 + 3 * 2**-7, 2 - 2**-7]) * 2.0**-126
    b, a = values.astype(DTYPES["BF16"])[:, None], np.ones((1, 7), DTYPES["BF16"])
    item = item_of([LowRank(ArrayTensor(b), ArrayTensor(a), 1.0, (4, 7))], [1.0])
    left, _ = stacked(OPS, item, 1, "BF16", "x.weight")

    # Halves of steps of 2⁻¹³³, ties to even.
    assert (left[:, 0].astype("f8") * 2.0**133).tolist() == [64, 64, 66, 128]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_stops(dtype: str, value: float, side: int) -> None:
    """In either factor, also in one that is only copied; the error names the model."""
    pair = drawn(1, 2, dtype, 0)
    pair[side][1, 1] = value
    item = item_of([None, low_rank(*pair, 1.0)], [2.0, 2.0])
    with pytest.raises(MergebenchError, match="m1"):
        stacked(OPS, item, 2, dtype, "x.weight")
