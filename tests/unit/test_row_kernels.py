"""Thresholds and ranks of rows, as kernels find them, against sorted lists; and whole merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergebench.compute.jit import float_kernel
from mergebench.compute.random import as_shares, draws, stream_of
from mergebench.compute.spare import Spare
from mergebench.compute.tiles import Tiling
from mergebench.core.delta import Dense
from mergebench.core.errors import MergebenchError
from mergebench.core.schedule import Gradient
from mergebench.core.site import Site
from mergebench.core.tensor import ArrayTensor
from mergebench.merge.chains import chain
from mergebench.merge.foreseen import foresee, looks_at_rows
from mergebench.merge.item import Item
from mergebench.merge.kernels import codes, fuse, ranks, ready, thresholds
from mergebench.merge.kernels.program import program
from mergebench.merge.kernels.running import Looking
from mergebench.merge.kernels.stages import Draw, Multiply, RowDraw, RowWindow, side_by_side
from mergebench.merge.ops.band import band
from mergebench.merge.ops.magprune import magprune
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.trim import trim
from mergebench.recipe import ModelRef, Recipe

from .test_kernels import BF16, F16, F32, ROWS, assert_kernels_equal_ops, entries, had, merged

#: Parts of kernels, to be called alone.
ranked, radix, window_rows = (
    float_kernel(each.py_func) for each in (ranks.ranked, ranks._radix, thresholds.window_rows)
)
LARGEST = np.finfo(F32).max
#: What rows hold: numbers of every size and sign, few distinct ones, and one beyond all others.
KINDS = ("normal", "tied", "denormal", "sparse", "wide", "equal", "zero", "rising", "falling",
         "lonely", "largest", "bits", "coarse")  # fmt: skip


def row_of(random: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """A row of one kind, float32, finite."""
    values = random.normal(size=size).astype(F32)
    match kind:
        case "equal":
            return np.where(values < 0, F32.type(-0.75), F32.type(0.75))
        case "zero":
            return np.where(values < 0, F32.type(-0.0), F32.type(0.0))
        case "rising" | "falling":
            line = (np.arange(1, size + 1) * 1e-3).astype(F32)
            return line if kind == "rising" else -line[::-1].copy()
        case "lonely":
            values[size // 2] = 1e30
        case "largest":
            return np.where(random.random(size) < 0.3, LARGEST, values)
        case "bits":
            found = random.integers(0, 0x7F800000, size, dtype=np.uint32).view(F32)
            return np.where(values < 0, -found, found)
        case "coarse":
            below = (random.normal(size=size) * 0.02).astype(BF16).astype(F32)
            return (below + values / 1000).astype(BF16).astype(F32) - below
        case _:
            return entries(random, kind, size)
    return values


def order_of(row: np.ndarray) -> list[int]:
    """Places by falling magnitude, the earlier of equals first."""
    return sorted(range(len(row)), key=lambda place: (-abs(float(row[place])), place))


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """One to five rows of one length."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    length = draw(st.one_of(st.sampled_from(ROWS), st.integers(1, 400)))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))
    return np.stack([row_of(random, kind, length) for kind in kinds])


def assert_window(table: np.ndarray, low: int, high: int, ties: bool, hints: Any) -> None:
    """What stays of every row is what a sorted list says; the rest is zero with its sign."""
    length = table.shape[1]
    expected = table.copy()
    for row, before in zip(expected, table, strict=True):
        order = order_of(before)
        stays = set(order[low:high])
        if ties and 0 < high <= length:
            least = abs(before[order[high - 1]])
            stays |= {place for place in order[low:] if abs(before[place]) == least}
        for place in range(length):
            if place not in stays:
                row[place] = np.copysign(F32.type(0), row[place])
    got = table.reshape(-1).copy()
    sizes = np.empty(codes.FEW, np.int64)
    window_rows(got, length, low, high, ties, hints, sizes, got.size)
    assert got.tobytes() == expected.tobytes()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_windows_of_rows_are_those_of_sorted_lists(data: st.DataObject) -> None:
    """Every pair of ranks, whatever thresholds are expected."""
    table = data.draw(rows())
    length = table.shape[1]
    low, high = (data.draw(st.integers(0, length)) for _ in range(2))
    ties = data.draw(st.booleans())
    hint = st.integers(0, 0x7F7FFFFF)
    hints = np.array(data.draw(st.lists(hint, min_size=4, max_size=4))).reshape(2, 2)
    assert_window(table, 0 if ties else low, high, ties, hints)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_of_a_row(kind: str) -> None:
    """All thresholds of short rows, alone and below another one."""
    random = np.random.default_rng(7)
    for length in (1, 2, 5, 8, 9, 12, 33):
        row = row_of(random, kind, length)[None]
        hints = np.zeros((2, 2), np.int64)
        for high in range(length + 1):
            assert_window(row, 0, high, True, hints)
            for low in range(high + 1):
                assert_window(row, low, high, False, hints)


def room_to_rank(length: int) -> tuple[np.ndarray, ...]:
    """Places, counts, pairs and the hint."""
    return (
        np.empty(length, np.uint32),
        np.empty(max(length + 1, codes.DIGITS), np.uint32),
        np.empty((2, length), np.uint64),
        np.zeros(1, np.int64),
    )


@given(table=rows(), following=st.booleans())
@settings(max_examples=150, deadline=None)
def test_ranks_are_those_of_sorted_lists(table: np.ndarray, following: bool) -> None:
    """Through buckets, insertion and the radix sort, in whatever order rows come."""
    places, counts, pairs, hint = room_to_rank(table.shape[1])
    hint[0] = following
    for row in table:
        ranked(row, places, counts, pairs, hint)
        falling = np.argsort(places)[::-1]
        assert falling.tolist() == order_of(row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [17, 100, 3000])
def test_buckets_and_the_radix_sort_agree(kind: str, length: int) -> None:
    """Also where neither is what :func:`ranked` would take."""
    row = row_of(np.random.default_rng(3), kind, length)
    places, counts, pairs, hint = room_to_rank(length)
    ranked(row, places, counts, pairs, hint)
    sorted_, others = np.empty(length, np.uint32), np.empty(length, np.uint64)
    radix(row, sorted_, counts, pairs[0], others)
    assert (places == sorted_).all()


def test_rows_that_are_fine_are_sorted_by_digits_for_a_while() -> None:
    """What buckets mix up in one row they mix up in the next ones."""
    row = row_of(np.random.default_rng(0), "bits", 5000)
    places, counts, pairs, hint = room_to_rank(5000)
    found = []
    for _ in range(18):
        ranked(row, places, counts, pairs, hint)
        found.append(int(hint[0]))
    assert found == [15, *range(14, -1, -1), 15, 14]


def item_of(tables: list[np.ndarray]) -> Item:
    """Dense updates without a base."""
    count = len(tables)
    return Item(
        Site("w", tables[0].shape),
        tuple(Dense(ArrayTensor(table)) for table in tables),
        (1.0,) * count,
        tuple("abc"[:count]),
        None,
        keys=tuple(range(5, 5 + count)),
    )


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_ops_of_rows_in_any_order(data: st.DataObject) -> None:
    """Several of them in a chain, before and after models are combined, over any parameters."""
    share = st.floats(0.001, 1)
    steps = st.one_of(
        st.builds(lambda d, count: trim(d, "row", count), share,
                  st.sampled_from(("exact", "at_least_one", "official"))),
        st.builds(lambda d, g, count, conflict: band(d, g, "row", count, conflict), share,
                  st.floats(0, 0.999), st.sampled_from(("exact", "at_least_one")),
                  st.sampled_from(("drop", "keep"))),
        st.builds(lambda d, e, rescale: magprune(d, e * min(d, 1 - d), 3, rescale),
                  st.floats(0.1, 0.95), st.sampled_from((0.0, 0.3, 0.99)),
                  st.sampled_from(("probability", "none"))),
        st.just(scale(0.3)),
    )  # fmt: skip
    before = data.draw(st.lists(steps, min_size=1, max_size=3))
    after = data.draw(st.lists(steps, max_size=1))
    ops = chain(*before, sum_(), *after)
    table = data.draw(rows())
    # Sums of the largest numbers would not be finite.
    tables = [table / 8, (table[::-1] / 32).copy(), table[:, ::-1] / 64]
    item = item_of([each.astype(F32) for each in tables[: data.draw(st.integers(1, 3))]])
    size = item.site.size
    plain = at = item.at(0, size)
    stack = np.stack([delta.values.read(0, size) for delta in item.deltas])
    with np.errstate(over="ignore", invalid="ignore"):
        for each in ops:
            stack = each.apply(stack, plain)
            plain = plain.after(each, at)
    # The largest numbers are too large once they are divided by a small probability.
    assume(np.isfinite(stack).all())
    fused = fuse.fuse([ops], item, lambda ops: None, had, ends=True)
    assert fused is not None
    tile = fused.tile(data.draw(st.sampled_from((1, 777, 1 << 16))), item.site.row)
    out, room = np.empty(size, F32), fused.buffers(tile, Spare(0))
    for begin in range(0, size, tile):
        end = min(begin + tile, size)
        assert fused.merge(room, (begin, end), "F32", [out[begin:end]])
    assert out.tobytes() == stack[0].tobytes()


def test_draws_by_rank_are_those_of_their_formula() -> None:
    """Against the definition, one entry after the other, with a stream for each model."""
    random = np.random.default_rng(1)
    tables = [random.normal(size=(6, 41)).astype(F32) for _ in range(2)]
    tables[0][:, 3:30] = 0.25
    item, ops = item_of(tables), chain(magprune(0.6, 0.3, 9, "probability"), sum_())
    expected = np.zeros(6 * 41, F32)
    for table, key in zip(tables, item.keys, strict=True):
        shares = as_shares(draws(stream_of(9, item.site.key, key), 0, expected.size))
        for number, row in enumerate(table):
            for rank, place in enumerate(reversed(order_of(row))):
                chance = (0.6 - 0.3) + rank / 40 * 2 * 0.3
                if shares[41 * number + place] < chance:
                    expected[41 * number + place] += row[place] / F32.type(chance)
    fused = fuse.fuse([ops], item, lambda ops: None, had, ends=True)
    assert fused is not None
    out = np.empty(expected.size, F32)
    assert fused.merge(fused.buffers(expected.size, Spare(0)), (0, expected.size), "F32", [out])
    np.testing.assert_array_equal(out, expected)


def test_probabilities_that_are_alike_need_no_ranks() -> None:
    """A row of one entry, and no distance between probabilities: shares just below are drawn."""
    for item, epsilon in ((item_of([np.ones((9, 1), F32)]), 0.2), (item_of([np.ones(9, F32)]), 0)):
        found = magprune(0.3, epsilon).stages(item.at(0, 9))
        assert found is not None
        assert isinstance(found[0], Draw)
        # The least share that is not below 0.3, of 2^32.
        assert found[0].limits == (1288490189,)


def test_models_with_ranks_of_their_own() -> None:
    """Stages of rows stand side by side where they are of one kind."""
    window = (RowWindow((0,), (3,), (False,)),), (RowWindow((1,), (4,), (True,)),)
    assert side_by_side(window) == (RowWindow((0, 1), (3, 4), (False, True)),)
    draw = RowDraw((1,), (0.5,), (0.1,), True), RowDraw((2,), (0.25,), (0.2,), True)
    joined = RowDraw((1, 2), (0.5, 0.25), (0.1, 0.2), True)
    assert side_by_side([(each,) for each in draw]) == (joined,)
    other = RowDraw((2,), (0.25,), (0.2,), False)
    assert side_by_side([(draw[0],), (other,)]) is None
    assert side_by_side([(draw[0],), (Multiply((2.0,)),)]) is None


@pytest.mark.parametrize("method", ["breadcrumbs", "ties", "della"])
def test_parameters_of_models(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Every model keeps a share of its own, in every row."""
    random = np.random.default_rng(3)
    base = {"w": random.normal(size=(40, 300)).astype(BF16)}
    models = [{"w": random.normal(size=(40, 300)).astype(BF16)} for _ in range(3)]
    params: dict[str, Any] = {} if method == "della" else {"scope": "row"}
    own: list[dict[str, Any]] = [{"density": 0.3}, {}, {"density": 0.6}]
    seen = assert_kernels_equal_ops(monkeypatch, models, base, [1.0] * 3, method, params, own=own)
    assert seen.left == 0
    assert seen.done["merge"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("method", ["breadcrumbs", "della"])
def test_rows_that_are_not_finite_are_left_to_the_ops(
    monkeypatch: pytest.MonkeyPatch, bad: float, dtype: Any, method: str
) -> None:
    """Of the tile that holds such an entry they take all rows, of others none."""
    random = np.random.default_rng(4)
    base = {"w": random.normal(size=(60, 300)).astype(dtype)}
    models = [{"w": random.normal(size=(60, 300)).astype(dtype)} for _ in range(2)]
    models[1]["w"][50, 7] = bad
    params = {"tie": "plus"} if method == "della" else {}
    seen = assert_kernels_equal_ops(
        monkeypatch, models, base, [1.0, 1.0], method, params,
        tiling=Tiling(300, 6000, 1), allow_nonfinite=True,
    )  # fmt: skip
    assert seen.left == 1
    assert seen.done["merge"] > 5
    monkeypatch.setenv(ready.VARIABLE, "on")
    with pytest.raises(MergebenchError, match=r"1 NaN|1 infinite"):
        merged(models, base, [1.0, 1.0], method, params)


def test_no_products_of_blocks_after_stages_of_rows() -> None:
    """Blocks end elsewhere; the ops sum them up then."""
    item = item_of([np.ones((4, 9), F32)])
    steps = program((RowWindow((0,), (3,), (False,)),), 1, item.site)
    fused = fuse.fuse([chain(trim(0.5, "row"))], item, lambda ops: None, had, ends=False)
    assert fused is not None
    room = fused.buffers(36, Spare(0))
    room.read(0, 36)
    assert Looking(room, fused.kernels, steps).products() is None
    assert Looking(room, fused.kernels, steps).ballot("mass", ()) == 12


def test_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a tile of any size, and alone."""
    random = np.random.default_rng(11)
    base = {"w": random.normal(size=(2, 300_000)).astype(ml_dtypes.bfloat16)}
    models = [
        {"w": (base["w"].astype(F32) + entries(random, kind, (2, 300_000)) / 8).astype(BF16)}
        for kind in ("normal", "tied", "wide")
    ]
    for method, params in (("breadcrumbs", {}), ("ties", {"scope": "row"}), ("della", {})):
        seen = assert_kernels_equal_ops(monkeypatch, models, base, [1.0] * 3, method, params)
        assert seen.left == 0
        assert seen.done["merge"] == 2


@pytest.mark.parametrize(
    ("method", "params", "expected"),
    [
        ("breadcrumbs", {}, True),
        ("breadcrumbs", {"scope": "tensor"}, False),
        ("della", {"density": [1.0, 0.5]}, True),
        ("ties", {}, False),
        ("ties", {"scope": "row", "density": Gradient((0.1, 0.5))}, True),
        ("ties", {"scope": "row", "density": Gradient((1.0, 0.5))}, False),
        ("no such method", {}, False),
    ],
)
def test_what_a_recipe_will_want(method: str, params: dict[str, Any], expected: bool) -> None:
    """Rows, where a chain is known to have them; mistakes are not told here."""
    models = tuple(ModelRef(name) for name in ("a", "b"))
    assert looks_at_rows(Recipe(models, method, params, base="p")) == expected


def test_kernels_are_begun_for_large_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stages of rows or without; small inputs begin nothing."""
    begun: list[bool] = []
    monkeypatch.setattr(ready, "_begun", begun.append)
    monkeypatch.setattr(ready, "WORTHWHILE", 50)
    for name, size in (("a", 60), ("b", 40), ("c", 39)):
        (tmp_path / name).write_bytes(bytes(size))
    small, large = (tuple(ModelRef(str(tmp_path / x)) for x in names) for names in ("ac", "ab"))
    foresee(Recipe(small, "breadcrumbs"))
    assert begun == []
    foresee(Recipe(large, "breadcrumbs"))
    foresee(Recipe(large, "linear"))
    assert begun == [True, False]
