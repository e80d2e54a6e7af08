"""Kernels equal ops: the same bits, for whatever stands in the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import partial
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.compute.magnitudes import bits
from mergebench.compute.masking import moved
from mergebench.compute.search import Search
from mergebench.compute.spare import Spare
from mergebench.compute.tiles import Tiling
from mergebench.core.delta import Dense, Difference, LowRank
from mergebench.core.errors import MergebenchError
from mergebench.core.site import Site
from mergebench.core.tensor import ArrayTensor
from mergebench.merge.chains import chain
from mergebench.merge.engine import execute_in_memory
from mergebench.merge.item import Item, load
from mergebench.merge.kernels import fuse, ready
from mergebench.merge.kernels.running import Buffers, Looking
from mergebench.merge.ops.clip import clip
from mergebench.merge.ops.mean import mean
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from mergebench.sources import source_of_arrays

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
BF16 = np.dtype(ml_dtypes.bfloat16)
Arrays = dict[str, np.ndarray]
had = partial(ready.kernels, None)

#: Methods with parameters that kernels can run on every tensor, and whether they take a base.
FUSED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "linear": ("linear", {}, False),
    "linear, summed": ("linear", {"normalize": False}, False),
    "task_arithmetic": ("task_arithmetic", {"lam": 0.3}, True),
    "task_arithmetic, averaged": ("task_arithmetic", {"lam": 0.3, "normalize": True}, True),
    "lines": ("lines", {"alpha": "0.25", "lam": 0.7}, True),
    "lines, by norms": ("lines", {}, True),
    "dare": ("dare", {"density": 0.3}, True),
    "dare, L1 norm": ("dare", {"density": 0.3, "rescale": "l1", "seed": 3}, True),
    "dare_ties": ("dare_ties", {"density": 0.6}, True),
    "magnitude_prune": ("magnitude_prune", {"density": 0.3}, True),
    "ties, per tensor": ("ties", {"scope": "tensor", "tie": "plus"}, True),
    "ties, minus": ("ties", {"scope": "tensor", "tie": "minus", "density": 0.5}, True),
    "ties, zero": ("ties", {"scope": "tensor", "tie": "zero", "density": 1}, True),
    "ties, whole model": ("ties", {}, True),
    "ties, counted": ("ties", {"sign": "count", "election": "weighted"}, True),
    "ties, official": ("ties", {"count": "official", "divisor": "none"}, True),
    "ties, by weights": ("ties", {"divisor": "weights", "election": "weighted"}, True),
    "ties, undivided": ("ties", {"divisor": "weights", "cancelled": "sum"}, True),
    "breadcrumbs, per tensor": ("breadcrumbs", {"scope": "tensor"}, True),
    "breadcrumbs, whole model": ("breadcrumbs", {"scope": "model", "gamma": 0.3}, True),
    "breadcrumbs": ("breadcrumbs", {}, True),
    "breadcrumbs, in conflict": ("breadcrumbs", {"density": 0.9, "gamma": 0.6}, True),
    "breadcrumbs, density kept": (
        "breadcrumbs", {"density": 0.9, "gamma": 0.3, "conflict": "keep", "count": "exact"}, True
    ),
    "magnitude_prune, per row": ("magnitude_prune", {"scope": "row", "density": 0.4}, True),
    "ties, per row": ("ties", {"scope": "row"}, True),
    "ties, official per row": ("ties", {"scope": "row", "count": "official"}, True),
    "ties, one of each row": (
        "ties", {"scope": "row", "density": 0.01, "count": "at_least_one", "tie": "plus"}, True
    ),
    "della": ("della", {}, True),
    "della, far apart": ("della", {"density": 0.5, "epsilon": 0.45, "tie": "zero"}, True),
    "della, alike": ("della", {"epsilon": 0}, True),
    "della, not rescaled": ("della", {"rescale": "none", "seed": 5}, True),
    "della, L1 norm": ("della", {"rescale": "l1"}, True),
    "della_linear": ("della_linear", {"density": 0.4}, True),
    "karcher": ("karcher", {}, False),
    "multislerp": ("multislerp", {}, True),
    "model_stock": ("model_stock", {}, True),
}  # fmt: skip
#: Lengths of rows: of one entry, of few, at stretches and tiles, beyond them, and none of those.
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 64, 100, 777, 1000, 2047, 2048, 2049, 5000)


#: Chains of linear ops, in weight space and in delta space.
CHAINS = (
    chain(mean()),
    chain(mean(), scale(0.3)),
    chain(scale(0.3), mean()),
    chain(weigh(), sum_(), scale(0.3)),
    chain(weigh(), scale(0.3), sum_(), scale(3.0), scale(0.7)),
)


def entries(random: np.random.Generator, kind: str, size: int | tuple[int, ...]) -> np.ndarray:
    """Numbers of one kind, float32."""
    values = np.asarray(random.normal(size=size), F32)
    if kind == "tied":
        return np.asarray(np.round(values * 2) / 4, F32)
    if kind == "denormal":
        return np.asarray(values * np.float32(2e-41), F32)
    if kind == "sparse":
        return np.where(random.random(size) < 0.8, F32.type(-0.0), values)
    if kind == "wide":
        return np.asarray(values * np.exp2(random.integers(-20, 12, size)), F32)
    return values


def shape() -> st.SearchStrategy[tuple[int, ...]]:
    """Vectors, matrices and convolutions of up to 9000 entries."""
    vectors = st.integers(0, 9000).map(lambda n: (n,))
    matrices = st.sampled_from(ROWS).flatmap(
        lambda row: st.integers(0, 9000 // row).map(lambda rows: (rows, row))
    )
    convolutions = st.tuples(st.integers(1, 20), st.integers(1, 40), st.just(3), st.integers(1, 4))
    return st.one_of(vectors, matrices, convolutions)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Arrays], Arrays, list[float]]:
    """A base and one to four models, of any mixture of stored dtypes, and weights."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kinds = ("normal", "tied", "denormal", "sparse", "wide")
    count = draw(st.integers(1, 4))
    shapes = {f"layers.{i}.w": draw(shape()) for i in range(draw(st.integers(1, 3)))}
    shapes |= {"one": (1,), "scalar": ()}
    below = {n: entries(random, draw(st.sampled_from(kinds)), s) for n, s in shapes.items()}
    dtypes = [draw(st.sampled_from((F32, F16, BF16))) for _ in range(count + 1)]
    tables = []
    for dtype in dtypes[1:]:
        kind = draw(st.sampled_from(kinds))
        moved = {n: b + entries(random, kind, b.shape) / 4 for n, b in below.items()}
        tables.append({n: np.asarray(array, dtype) for n, array in moved.items()})
    weights = [draw(st.sampled_from((1.0, 0.5, 0.3, 2.0, 1.0))) for _ in range(count)]
    return tables, {n: b.astype(dtypes[0]) for n, b in below.items()}, weights


def merged(
    models: Sequence[Arrays],
    base: Arrays | None,
    weights: Sequence[float],
    method: str,
    params: dict[str, Any],
    tiling: Tiling | None = None,
    own: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> list[Arrays]:
    """What a merge in memory gives; ``own`` has parameters of each model."""
    sources = [
        source_of_arrays(f"m{i}", {name: ArrayTensor(array) for name, array in each.items()})
        for i, each in enumerate(models)
    ]
    below = None
    if base is not None:
        below = source_of_arrays("base", {n: ArrayTensor(array) for n, array in base.items()})
    recipe = Recipe(
        models=tuple(
            ModelRef(f"m{i}", weight, params=each)
            for i, (weight, each) in enumerate(
                zip(weights, own or [{}] * len(weights), strict=True)
            )
        ),
        method=method,
        params=params,
        base=None if base is None else "base",
        allow_base_mismatch=True,
        **options,
    )
    plan = make_plan(recipe, sources=sources, base=below, workers=1)
    plan = plan if tiling is None else replace(plan, tiling=tiling)
    return execute_in_memory(plan)


class Seen:
    """Counts what kernels have done, and what they have left to the ops."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: dict[str, int] = {}
        self.left = 0
        for owner, name in (
            (Buffers, "merge"),
            (Buffers, "stack"),
            (Looking, "survey"),
            (Looking, "products"),
            (Looking, "ballot"),
        ):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name), name))

    def _counted(self, function: Any, name: str) -> Any:
        def called(*given: Any) -> Any:
            found = function(*given)
            worked = found is not None and found is not False
            self.done[name] = self.done.get(name, 0) + worked
            self.left += not worked
            return found

        return called


def outcome(*case: Any, **options: Any) -> list[Arrays] | str:
    """The result, or the words with which it is refused."""
    try:
        return merged(*case, **options)
    except MergebenchError as error:
        return str(error)


def assert_kernels_equal_ops(monkeypatch: pytest.MonkeyPatch, *case: Any, **options: Any) -> Seen:
    """The same bytes with and without kernels; what the kernels did."""
    with monkeypatch.context() as patch:
        patch.setenv(ready.VARIABLE, "off")
        expected = outcome(*case, **options)
        patch.setenv(ready.VARIABLE, "on")
        # They try themselves out when they are loaded, which is not to be counted.
        assert None not in {ready.kernels(rows=rows) for rows in (False, True)}
        seen = Seen(patch)
        got = outcome(*case, **options)
    if isinstance(expected, str) or isinstance(got, str):
        assert got == expected
        return seen
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in other.items():
            assert one[name].dtype == array.dtype
            same = one[name].reshape(-1).view(np.uint8) == array.reshape(-1).view(np.uint8)
            assert same.all(), (name, one[name].flat[:9], array.flat[:9])
    return seen


@pytest.mark.parametrize("name", FUSED)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_kernels_equal_ops(name: str, data: st.DataObject) -> None:
    """Every fused chain, over dtypes, sizes, tiles, ties, zeros of both signs and denormals."""
    method, params, based = FUSED[name]
    models, base, weights = data.draw(cases())
    tile = data.draw(st.sampled_from((1 << 16, 4096, 1, 777)))
    workers = data.draw(st.sampled_from((1, 1, 3)))
    tile = tile if max(b.size for b in base.values()) < 40 * tile else 777
    tiling = Tiling(tile, 3 * tile, workers)
    dtype = data.draw(st.sampled_from(("keep", "bf16", "f16", "f32")))
    with pytest.MonkeyPatch.context() as patch:
        options = {"tiling": tiling, "dtype": dtype}
        case = models, base if based else None, weights, method, params
        seen = assert_kernels_equal_ops(patch, *case, **options)
        fits = isinstance(outcome(*case, **options), list)
    # What does not fit the stored dtype is left to the ops, which say so.
    assert (seen.left == 0) == fits
    assert seen.done["merge"] > 0 or not fits


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_brackets_of_any_width(data: st.DataObject) -> None:
    """Counts, and what lies inside in order, where few do and where all do, for any piece."""
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    table = entries(random, data.draw(st.sampled_from(["normal", "tied", "sparse"])), 5000)
    start = data.draw(st.integers(0, 4999))
    stop = data.draw(st.integers(start + 1, 5000))
    delta = Dense(ArrayTensor(table.astype(F32)))
    item = Item(Site("w", (5000,)), (delta,), (1.0,), ("a",), None)
    fused = fuse.fuse([()], item, lambda ops: None, had, ends=False)
    assert fused is not None
    room = fused.buffers(stop - start, Spare(0))
    room.read(start, stop)
    sizes = bits(table.astype(F32))
    ends = st.one_of(st.integers(1, 2**31 - 1), st.sampled_from(np.maximum(sizes, 1).tolist()))
    kind, brackets = np.dtype(np.int32), []
    for _ in range(data.draw(st.integers(1, 3))):
        low, high = sorted(data.draw(st.tuples(ends, ends)))
        brackets.append((0, low, high))
    found = fused.looking(room).survey(brackets)
    assert found is not None
    for (_, low, high), tally, values, places in zip(brackets, *found, strict=True):
        size = stop - start
        expected = Search(0, 1, low, high, kind, size).look(sizes[start:stop], start)
        got = Search(0, 1, low, high, kind, size).found(*map(int, tally), values, places, size)
        assert astuple(got)[:4] == astuple(expected)[:4]
        assert (got.values is None) == (expected.values is None)
        if got.values is None:
            assert np.array_equal(got.counts, expected.counts)
        else:
            assert got.values.tolist() == expected.values.tolist()
            assert got.places.tolist() == expected.places.tolist()


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["normal", "tied", "sparse"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_thresholds_of_large_tensors(
    monkeypatch: pytest.MonkeyPatch, density: float, kind: str, dtype: Any
) -> None:
    """Where a sample brackets them, thresholds and what ties with them are those of the ops."""
    random = np.random.default_rng(5)
    base = {name: random.normal(size=300_000).astype(dtype) for name in ("b", "a")}
    models = [
        {
            n: (b.astype(F32) + entries(random, kind, b.size) / 8).astype(dtype)
            for n, b in base.items()
        }
        for _ in range(3)
    ]
    for scope in ("tensor", "model"):
        params = {"scope": scope, "density": density}
        seen = assert_kernels_equal_ops(monkeypatch, models, base, [1.0] * 3, "ties", params)
        assert seen.left == 0
        assert seen.done["survey"] > 0
        assert seen.done["ballot"] > 0


def test_slerp_measures_and_merges_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models; the blocks of inner products end with the tensor and not with a block."""
    random = np.random.default_rng(2)
    models = [{"w": random.normal(size=70_001).astype(BF16)} for _ in range(2)]
    seen = assert_kernels_equal_ops(monkeypatch, models, None, [0.3, 0.7], "slerp", {})
    assert seen.done["products"] == 1
    assert seen.done["merge"] == 1


def test_several_outputs_and_parameters_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output has a program of its own, and so has every model."""
    random = np.random.default_rng(3)
    base = {"w": random.normal(size=30_000).astype(BF16)}
    models = [{"w": random.normal(size=30_000).astype(BF16)} for _ in range(3)]
    params = {"lam": (0.2, 0.5), "scope": "tensor", "tie": "plus"}
    seen = assert_kernels_equal_ops(monkeypatch, models, base, [1.0] * 3, "ties", params)
    assert seen.done["merge"] == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["base", "model"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name", ["task_arithmetic", "ties, whole model", "model_stock"])
def test_what_is_not_finite_is_left_to_the_ops(
    monkeypatch: pytest.MonkeyPatch, bad: float, where: str, dtype: Any, name: str
) -> None:
    """They refuse it with the same words, or let it pass where they are told to."""
    random = np.random.default_rng(4)
    base = {"w": random.normal(size=9000).astype(dtype)}
    models = [{"w": random.normal(size=9000).astype(dtype)} for _ in range(2)]
    (base if where == "base" else models[1])["w"][8000] = bad
    method, params, _ = FUSED[name]
    case = models, base, [1.0, 1.0], method, params
    seen = assert_kernels_equal_ops(monkeypatch, *case, allow_nonfinite=True)
    assert seen.left > 0
    words = []
    for choice in ("off", "on"):
        monkeypatch.setenv(ready.VARIABLE, choice)
        with pytest.raises(MergebenchError) as caught:
            merged(*case)
        words.append(str(caught.value))
    assert words[0] == words[1]


#: NaN with every bit set, as GPUs make them, and with few; of each dtype, in both signs.
NANS = {F32: (0x7FFFFFFF, 0x7FFF8000, 0x7F800001), F16: (0x7FFF, 0x7C01), BF16: (0x7FFF, 0x7F81)}


@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("dtype", list(NANS), ids=str)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp", "ties"])
def test_no_nan_passes_for_a_number(
    monkeypatch: pytest.MonkeyPatch, stored: str, dtype: Any, method: str
) -> None:
    """Whatever its bits are, and whatever it would be rounded to."""
    based = method in ("task_arithmetic", "ties")
    places = ["model", "base"] if based else ["model"]
    words = np.uint32 if dtype == F32 else np.uint16
    for number, (nan, where) in enumerate(product(NANS[dtype], places)):
        random = np.random.default_rng(number)
        base = {"w": random.normal(size=5000).astype(dtype)} if based else None
        models = [{"w": random.normal(size=5000).astype(dtype)} for _ in range(2)]
        sign = (number % 2) << (8 * dtype.itemsize - 1)
        (models[1] if where == "model" or base is None else base)["w"].view(words)[70] = nan | sign
        said = []
        for choice in ("off", "on"):
            monkeypatch.setenv(ready.VARIABLE, choice)
            with pytest.raises(MergebenchError, match="1 NaN") as caught:
                merged(models, base, [1.0, 1.0], method, {}, dtype=stored)
            said.append(str(caught.value))
        assert said[0] == said[1]
        assert_kernels_equal_ops(
            monkeypatch, models, base, [1.0, 1.0], method, {}, dtype=stored, allow_nonfinite=True
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [100, -1], ids=["in a stretch", "at the end"])
@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize(("dtype", "size"), [(F32, 9000), (BF16, 9000), (BF16, 9216)], ids=str)
def test_no_products_of_what_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, bad: float, place: int, model: int, dtype: Any, size: int
) -> None:
    """Also where rows are multiplied as they are stored, and nothing looks at single entries."""
    random = np.random.default_rng(6)
    models = [{"w": random.normal(size=size).astype(dtype)} for _ in range(2)]
    models[model]["w"][place] = bad
    seen = assert_kernels_equal_ops(
        monkeypatch, models, None, [1.0, 1.0], "slerp", {}, allow_nonfinite=True
    )
    assert seen.done["products"] == 0
    assert seen.left > 0


@pytest.mark.parametrize(("dtype", "stored"), [(F32, "f16"), (F16, "keep"), (BF16, "keep")])
def test_what_overflows_is_refused_with_the_same_words(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, stored: str
) -> None:
    """The largest numbers of a dtype, and a step beyond them."""
    limit = ml_dtypes.finfo(dtype).max if stored == "keep" else np.float32(65504)
    base = {"w": np.full(5000, limit, dtype)}
    models = [{"w": np.full(5000, limit / 2, dtype)}]
    words = []
    for choice in ("off", "on"):
        monkeypatch.setenv(ready.VARIABLE, choice)
        with pytest.raises(MergebenchError) as caught:
            merged(models, base, [1.0], "task_arithmetic", {"lam": -1.0}, dtype=stored)
        words.append(str(caught.value))
    assert words[0] == words[1]
    assert "do not fit" in words[0]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_every_stored_number_is_read_and_rounded_right(
    monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    """All finite numbers of 16 bits, and float32 numbers at and beside all midpoints of them."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    every = every[np.isfinite(every.astype(F32))]
    got = assert_kernels_equal_ops(
        monkeypatch, [{"w": every}], None, [1.0], "linear", {"normalize": False}, dtype="f32"
    )
    assert got.left == 0
    ordered = np.sort(every.astype(F32))
    middle = ((ordered[1:].astype(np.float64) + ordered[:-1]) / 2).astype(F32)
    around = [np.nextafter(middle, F32.type(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate([ordered, middle, *around])
    case = [{"w": values}], None, [1.0], "linear", {"normalize": False}
    name = {"float16": "f16", "bfloat16": "bf16"}[dtype.name]
    assert assert_kernels_equal_ops(monkeypatch, *case, dtype=name).left == 0


def test_small_merges_are_left_to_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel takes longer to load than they take."""
    monkeypatch.delenv(ready.VARIABLE, raising=False)
    assert not ready.wanted(ready.WORTHWHILE - 1)
    assert ready.wanted(ready.WORTHWHILE)
    monkeypatch.setenv(ready.VARIABLE, "off")
    assert not ready.wanted(1 << 40)
    monkeypatch.setenv(ready.VARIABLE, "fast")
    with pytest.raises(MergebenchError, match="auto, on or off"):
        ready.wanted(1)


def test_without_a_compiler_ops_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be compiled is said, once, and nothing else changes."""
    random = np.random.default_rng(6)
    models = [{"w": random.normal(size=5000).astype(BF16)} for _ in range(2)]
    case = models, None, [1.0, 1.0], "linear", {}
    monkeypatch.setenv(ready.VARIABLE, "on")
    expected = merged(*case)[0]["w"]
    ready._begun.cache_clear()

    def broken(rows: bool) -> Any:
        raise OSError("no compiler here")

    monkeypatch.setattr(ready, "_compiled", broken)
    notes: list[str] = []
    assert ready.kernels(notes.append) is None
    assert len(notes) == 1
    assert "no compiler here" in notes[0]
    assert merged(*case)[0]["w"].tobytes() == expected.tobytes()
    ready._begun.cache_clear()


@pytest.mark.parametrize("based", [True, False], ids=["onto a base", "update"])
@pytest.mark.parametrize("kinds", list(product("NDFL", repeat=2)), ids="".join)
def test_updates_of_all_structures(kinds: tuple[str, str], based: bool) -> None:
    """Nothing, dense, differences and low rank, side by side, give what the ops give."""
    random = np.random.default_rng(8)
    shape = (60, 50)

    def tensor(*sides: int) -> ArrayTensor:
        return ArrayTensor(random.normal(size=sides).astype(BF16))

    base = tensor(*shape)
    made: dict[str, Any] = {
        "N": lambda: None,
        "D": lambda: Dense(tensor(*shape)),
        "F": lambda: Difference(tensor(*shape), base),
        "L": lambda: LowRank(tensor(60, 3), tensor(3, 50), 0.7, shape),
    }
    item = Item(
        Site("w", shape), tuple(made[k]() for k in kinds), (0.4, 1.0), ("a", "b"),
        base if based else None,
    )  # fmt: skip
    raw, below = load(item, 0, 3000)
    at = item.at(0, 3000)
    for ops in CHAINS:
        plain = at
        stack = raw
        for each in ops:
            stack = each.apply(stack, plain)
            plain = plain.after(each, at)
        expected = stack[0] if below is None else moved(below, stack[0])
        fused = fuse.fuse([ops], item, lambda ops: None, had, ends=True)
        assert fused is not None
        out = np.empty(3000, F32)
        assert fused.merge(fused.buffers(3000, Spare(0)), (0, 3000), "F32", [out])
        assert out.tobytes() == expected.tobytes(), ops
    spans = [(7, 107), (1000, 1001), (2900, 3000)]
    bare, drawn = (
        fuse.fuse([ops], item, lambda ops: None, had, ends=False) for ops in ((), chain(scale(2)))
    )
    assert bare is not None
    assert drawn is not None
    together = bare.runs(bare.buffers(201, Spare(0)), spans)
    assert together is not None
    assert together.tobytes() == np.concatenate([raw[:, a:b] for a, b in spans], axis=1).tobytes()
    assert drawn.runs(drawn.buffers(201, Spare(0)), spans) is None


def test_a_chain_with_an_op_without_stages_is_left_to_the_ops() -> None:
    """One op is enough."""
    values = Dense(ArrayTensor(np.ones(9, F32)))
    item = Item(Site("w", (9,)), (values, values), (1.0, 1.0), ("a", "b"), None)
    for ops, fusible in ((chain(mean()), True), (chain(mean(), clip(0.5)), False)):
        found = fuse.fuse([ops], item, lambda ops: None, had, ends=True)
        assert (found is not None) == fusible
    wide = replace(item, dtype=np.dtype(np.float64))
    assert fuse.fuse([chain(mean())], wide, lambda ops: None, had, ends=True) is None
    assert fuse.fits("BF16")
    assert not fuse.fits("F64")
