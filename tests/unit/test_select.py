"""The exact k-th magnitude against one stable sort of everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.compute import select
from mergebench.compute.cut import ALL, NONE, Cut
from mergebench.compute.magnitudes import bits, order_statistics
from mergebench.compute.search import Search
from mergebench.compute.select import kth_magnitudes

from .sweeps import Tables, assert_exact

SIZE = 200_000
SMALLEST = 1.401298464324817e-45


def heavy(random: np.random.Generator, size: int) -> np.ndarray:
    """Numbers over the whole range of float32, signs alternating."""
    return np.exp(random.normal(size=size) * 12).clip(1e-37, 1e37) * (-1.0) ** np.arange(size)


DATA: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda random, size: random.normal(size=size),
    "few levels": lambda random, size: random.integers(-9, 10, size) / 8,
    "ternary": lambda random, size: random.choice([-0.5, 0.5], size),
    "all equal": lambda random, size: np.full(size, -3.25),
    "all zero": lambda random, size: np.zeros(size),
    "mostly zero": lambda random, size: random.normal(size=size) * (random.random(size) < 0.01),
    "denormal": lambda random, size: random.integers(-9, 10, size) * SMALLEST,
    "rising": lambda random, size: np.linspace(0.0, 1.0, size),
    "falling": lambda random, size: np.linspace(-1.0, 0.0, size),
    "heavy tails": heavy,
    "steps": lambda random, size: np.repeat(random.normal(size=size // 1000 + 1), 1000)[:size],
    "one outlier": lambda random, size: np.concatenate([np.full(size - 1, 1e-8), [1e30]]),
    "close together": lambda random, size: 1 + random.integers(0, 300, size) * 2.0**-23,
}


def stacks_of(make: Callable[..., np.ndarray], size: int, dtype: Any) -> dict[str, np.ndarray]:
    """Two models of three tensors, whose names are not in the order in which they are given."""
    flat = np.stack([make(np.random.default_rng(seed), size) for seed in (5, 6)]).astype(dtype)
    cuts = [size // 7, size // 2]
    parts = np.split(flat, cuts, axis=1)
    return dict(zip(("b", "a.weight", "B"), parts, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("capacity", [1 << 16, 1 << 22])
@pytest.mark.parametrize("kind", DATA)
def test_exactly_the_largest_are_kept(
    kind: str, capacity: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models and several ranks at once keep what a stable sort keeps, ties in its order."""
    monkeypatch.setattr(select, "CAPACITY", capacity)
    stacks = stacks_of(DATA[kind], SIZE, dtype)
    ranks = [1, 2, SIZE // 5, SIZE // 2 + 1, SIZE - 1]
    for model, cuts in enumerate(kth_magnitudes(Tables(stacks), [ranks, ranks[::-1]])):
        for rank, cut in zip(ranks if model == 0 else ranks[::-1], cuts, strict=True):
            assert_exact(stacks, model, rank, cut)


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 60),
    kind=st.sampled_from(sorted(DATA)),
    tile=st.integers(1, 70),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=50, deadline=None)
def test_small_models_and_any_tiles(seed: int, size: int, kind: str, tile: int, dtype: Any) -> None:
    """Every rank of a small model is exact, however it is cut into tiles."""
    random = np.random.default_rng(seed)
    flat = np.stack([DATA[kind](random, size)]).astype(dtype)
    cut = int(random.integers(0, size + 1))
    stacks = {"z": flat[:, :cut], "Z": flat[:, cut:]}
    (cuts,) = kth_magnitudes(Tables(stacks, tile), [range(size + 2)])
    assert cuts[0] is NONE
    assert cuts[size] is ALL
    assert cuts[size + 1] is ALL
    for rank, found in enumerate(cuts):
        assert_exact(stacks, 0, rank, found)


def test_nothing_is_read_where_nothing_is_asked() -> None:
    """Ranks of none and of everything cost no sweep; an empty model has no threshold."""
    tables = Tables({"w": np.ones((2, 9), np.float32)})
    assert kth_magnitudes(tables, [[0, -3], [9, 10]]) == [[NONE, NONE], [ALL, ALL]]
    assert kth_magnitudes(Tables({"w": np.ones((1, 0), np.float32)}), [[0, 1]]) == [[NONE, ALL]]
    assert tables.sweeps == 0


def test_torch_tensors_are_searched_too() -> None:
    """Tensors that carry gradients, of float32 and of bfloat16, give numpy's threshold."""
    array = np.random.default_rng(2).integers(-9, 10, (1, 500)).astype(np.float32) / 8
    (expected,) = kth_magnitudes(Tables({"w": array}), [[100]])
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.tensor(array, dtype=dtype, requires_grad=True)
        tables = Tables({"w": tensor}, seen=tensor)  # type: ignore[arg-type]
        assert kth_magnitudes(tables, [[100]]) == [expected]


NARROWED = {"overflow", "narrowed", "settled"}
TIED = {"tie at an end"}
NORMAL = DATA["normal"](np.random.default_rng(1), SIZE).astype(np.float32)[None]


def search(
    monkeypatch: pytest.MonkeyPatch, data: np.ndarray, rank: int, seen: np.ndarray | None
) -> set[str]:
    """Search with the least capacity, check the answer, and say which ways it took."""
    monkeypatch.setattr(select, "CAPACITY", 1 << 16)
    taken: set[str] = set()
    conclude = Search.conclude

    def spy(target: Search) -> Any:
        if target.inside > target.capacity and not target.kept:
            taken.add("overflow")
        low, high, was = target.low, target.high, target.cut
        tie = conclude(target)
        if tie is not None:
            taken.add("tie at an end")
        elif was is None and target.cut is not None:
            taken.add("zero" if target.cut.value == 0 else "settled")
        elif target.cut is None:
            higher, lower = target.low > high, target.high < low
            taken.add("widened up" if higher else "widened down" if lower else "narrowed")
        return tie

    monkeypatch.setattr(Search, "conclude", spy)
    stacks = {"w": data}
    ((cut,),) = kth_magnitudes(Tables(stacks, seen=seen), [[rank]])
    assert_exact(stacks, 0, rank, cut)
    return taken


@pytest.mark.parametrize(
    ("data", "rank", "seen", "ways"),
    [
        (NORMAL, SIZE // 5, None, {"settled"}),
        # The sample is a thousandth of the truth, so the threshold lies above its bracket.
        (NORMAL, SIZE // 5, NORMAL / 1000, {"widened up", *NARROWED}),
        (NORMAL, 300, NORMAL / 1000, {"widened up", *NARROWED}),
        (NORMAL, SIZE - 300, NORMAL * 1000, {"widened down", *NARROWED}),
        # Two halves far apart make a bracket that holds everything.
        (NORMAL, SIZE // 2, np.repeat(np.float32([[1e-30, 1e30]]), 5000, 1), NARROWED),
        (np.full_like(NORMAL, 0.5), SIZE // 2, None, TIED),
        (np.sign(NORMAL) * 0.25, 17, NORMAL, {"widened down", "overflow", "narrowed", *TIED}),
        (NORMAL * (NORMAL > 2), SIZE // 2, None, {"zero"}),
        (np.zeros_like(NORMAL), 5, None, {"zero"}),
    ],
    ids=["plain", "up", "up, few", "down", "wide", "equal", "ternary", "sparse", "empty"],
)
def test_every_way_of_the_search_is_exact(
    data: np.ndarray,
    rank: int,
    seen: np.ndarray | None,
    ways: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Misleading samples and ties beyond the capacity lead through every branch to the answer."""
    assert search(monkeypatch, data, rank, seen) == ways


@pytest.mark.parametrize(
    ("cut", "name", "start", "stop", "expected"),
    [
        (Cut(1.0, b"m", 4), "m", 0, 10, 5),
        (Cut(1.0, b"m", 4), "m", 5, 10, 0),
        (Cut(1.0, b"m", 4), "m", 4, 10, 1),
        (Cut(1.0, b"m", 4), "m", 0, 3, 3),
        (Cut(1.0, b"m", 4), "M", 2, 10, 8),
        (Cut(1.0, b"m", 4), "n", 2, 10, 0),
        (Cut(1.0, b"m", -1), "m", 0, 10, 0),
        (Cut(1.0, "é".encode(), 1), "z", 0, 3, 3),
        (Cut(1.0, b"m", 4), "m", 7, 7, 0),
        (ALL, "anything", 0, 3, 0),
    ],
)
def test_ties_until(cut: Cut, name: str, start: int, stop: int, expected: int) -> None:
    """Ties are counted up to the cut's place, tensors ordered by the bytes of their names."""
    assert cut.ties_until(name, start, stop) == expected


def test_magnitudes_are_ordered_as_integers() -> None:
    """The bits of magnitudes order as the magnitudes do, from denormals to the largest."""
    for dtype in (np.float32, np.float64):
        numbers = np.array([0.0, SMALLEST, 1e-38, 0.5, np.nextafter(1, 2), 3.0, 3e38], dtype)
        assert np.all(np.diff(bits(numbers)) > 0)
        assert np.array_equal(bits(-numbers), bits(numbers))


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(sorted(DATA)),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=50, deadline=None)
def test_order_statistics(seed: int, kind: str, dtype: Any) -> None:
    """At any places, and at the ends, what sorting leaves there."""
    random = np.random.default_rng(seed)
    numbers = bits(DATA[kind](random, 3000).astype(dtype))
    places = [0, 2999, *random.integers(0, 3000, 5).tolist()]
    assert order_statistics(numbers, places) == np.sort(numbers)[places].tolist()
