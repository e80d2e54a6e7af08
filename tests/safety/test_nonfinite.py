"""With ``--allow-nonfinite`` a NaN stays one NaN, and changes nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mergebench import merge_models
from mergebench.adapters_zoo.computed import Computed
from mergebench.core.delta import Dense
from mergebench.core.errors import MergebenchError
from mergebench.core.site import Site
from mergebench.merge.engine import execute
from mergebench.merge.item import Item, load, passed_through
from mergebench.merge.method import METHODS
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from tests.contract.collecting import statistics_of, wanted
from tests.helpers.adapters import factors, save_peft
from tests.helpers.compare import assert_same
from tests.helpers.files import BF16, F16, F32, Array, listing, read, write
from tests.helpers.models import base_model, fine_tune
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene, build_scene

Arrays = dict[str, Array]
BAD = {"NaN": np.nan, "Inf": np.inf, "-Inf": -np.inf}
MATRIX, VECTOR = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
F8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
#: Parameters that leave something to see of every method.
PARAMS: Mapping[str, Mapping[str, Any]] = {
    "ties": {"density": 0.4, "lam": 0.7},
    "breadcrumbs": {"density": 0.4, "gamma": 0.1, "lam": 0.7},
    "task_arithmetic": {"lam": 0.7},
    # What is drawn depends on the contents of the models, so that nothing is drawn here.
    "dare": {"density": 1.0},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "knots_dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "della_linear": {"density": 1.0, "epsilon": 0.0},
}


def floats(arrays: Mapping[str, Array], dtype: Any = F32) -> Arrays:
    """The floating tensors, in a dtype."""
    return {n: a.astype(dtype) for n, a in arrays.items() if a.dtype.kind not in "iub"}


def with_entry(arrays: Mapping[str, Array], name: str, place: Any, value: Any) -> Arrays:
    """A copy with one entry changed."""
    changed = {key: array.copy() for key, array in arrays.items()}
    changed[name][place] = value
    return changed


def assert_nan_only_at(merged: Arrays, expected: Arrays, name: str, *places: Any) -> None:
    """NaN at these places of one tensor; every other byte as in ``expected``."""
    patched = {key: array.copy() for key, array in expected.items()}
    for place in places:
        assert np.isfinite(expected[name][place].astype(np.float64))
        assert np.isnan(merged[name][place].astype(np.float64))
        patched[name][place] = merged[name][place]
    assert_same(merged, patched)


def methods(space: str) -> list[str]:
    """Names of the registered methods that take two models."""
    return [
        name
        for name in METHODS
        if METHODS[name].space in (space, "either")
        and METHODS[name].models[0] <= 2
        and METHODS[name].models[1] != 1
    ]


#: Methods whose last digit depends on the order of models, which is that of their contents.
ORDERED = {
    "fisher",
    "regmean",
    "regmean_pp",
    "karcher",
    "model_stock",
    "multislerp",
    "nuslerp",
    "slerp",
}


def assert_as_without(method: str, found: Arrays, expected: Arrays, name: str, place: Any) -> None:
    """NaN at one place, and all else as expected, to the last digit where that is promised."""
    if method not in ORDERED:
        assert_nan_only_at(found, expected, name, place)
        return
    assert np.isnan(found[name][place])
    patched = with_entry(found, name, place, expected[name][place])
    for key, array in expected.items():
        np.testing.assert_allclose(patched[key], array, rtol=1e-6, atol=1e-7)


def merged(method: str, models: list[Any], base: Any = None, **options: Any) -> Arrays:
    """In memory."""
    made = statistics_of(wanted(method), models, base)
    params = PARAMS.get(method, {})
    found = merge_models(models, base=base, method=method, statistics=made, **params, **options)
    if isinstance(found, list):
        # Where every model has a result of its own, that of the first one.
        found = found[0]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("method", methods("delta"))
def test_entry_of_a_model(method: str, kind: str) -> None:
    """As if that entry of that model were the base's, and NaN in its place."""
    base = floats(base_model())
    one, two = (floats(fine_tune(base, seed)) for seed in (1, 2))
    bad = with_entry(two, MATRIX, (3, 5), BAD[kind])
    still = with_entry(two, MATRIX, (3, 5), base[MATRIX][3, 5])
    with pytest.raises(MergebenchError, match=r"has . NaN and . infinite.*--allow-nonfinite"):
        merged(method, [one, bad], base)

    found = merged(method, [one, bad], base, allow_nonfinite=True)

    assert_as_without(method, found, merged(method, [one, still], base), MATRIX, (3, 5))
    assert np.isnan(bad[MATRIX][3, 5]) or np.isinf(bad[MATRIX][3, 5])


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("method", methods("delta"))
def test_entry_of_the_base(method: str, kind: str) -> None:
    """As if nothing were displaced there, whatever the models have."""
    base = floats(base_model())
    one, two = (floats(fine_tune(base, seed)) for seed in (1, 2))
    bad = with_entry(base, VECTOR, 7, BAD[kind])
    still = [with_entry(each, VECTOR, 7, 0) for each in (base, one, two)]

    found = merged(method, [one, two], bad, allow_nonfinite=True)

    assert_as_without(method, found, merged(method, still[1:], still[0]), VECTOR, 7)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("method", methods("weight"))
def test_entry_in_weight_space(method: str, kind: str) -> None:
    """Where weights are combined without a base, such an entry counts as zero."""
    one, two = (floats(fine_tune(base_model(), seed)) for seed in (1, 2))
    bad = with_entry(two, MATRIX, (0, 0), BAD[kind])
    still = with_entry(two, MATRIX, (0, 0), 0)

    found = merged(method, [one, bad], allow_nonfinite=True)

    assert_as_without(method, found, merged(method, [one, still]), MATRIX, (0, 0))


def test_several_entries() -> None:
    """Each model's, at the same place and at others, in one tensor and in two."""
    base = floats(base_model())
    one, two = (floats(fine_tune(base, seed)) for seed in (1, 2))
    bad_one = with_entry(with_entry(one, MATRIX, (3, 5), np.nan), MATRIX, (1, 2), np.nan)
    bad_two = with_entry(with_entry(two, MATRIX, (3, 5), np.inf), MATRIX, (9, 1), -np.inf)
    good_one = with_entry(
        with_entry(one, MATRIX, (3, 5), base[MATRIX][3, 5]), MATRIX, (1, 2), base[MATRIX][1, 2]
    )
    good_two = with_entry(
        with_entry(two, MATRIX, (3, 5), base[MATRIX][3, 5]), MATRIX, (9, 1), base[MATRIX][9, 1]
    )

    found = merged("ties", [bad_one, bad_two], base, allow_nonfinite=True)

    expected = merged("ties", [good_one, good_two], base)
    assert_nan_only_at(found, expected, MATRIX, (3, 5), (1, 2), (9, 1))


def test_weight_zero_counts() -> None:
    """A model of weight 0 takes part like any other: zero times NaN is NaN."""
    base = floats(base_model())
    one, two = (floats(fine_tune(base, seed)) for seed in (1, 2))
    bad = with_entry(two, VECTOR, 1, np.nan)

    found = merged("task_arithmetic", [one, (bad, 0.0)], base, allow_nonfinite=True)

    expected = merged("task_arithmetic", [one, (two, 0.0)], base)
    assert_nan_only_at(found, expected, VECTOR, 1)


@pytest.mark.parametrize("dtype", [BF16, F16, *F8], ids=str)
def test_every_dtype_has_a_nan(dtype: Any) -> None:
    """The output's dtype is the base's, and holds the NaN."""
    base = floats(base_model(), dtype)
    two = {name: (array.astype(F32) / 2).astype(dtype) for name, array in base.items()}
    bad = with_entry(two, MATRIX, (2, 2), np.nan)
    still = with_entry(two, MATRIX, (2, 2), base[MATRIX][2, 2])

    found = merged("task_arithmetic", [bad], base, allow_nonfinite=True)

    assert found[MATRIX].dtype == dtype
    assert_nan_only_at(found, merged("task_arithmetic", [still], base), MATRIX, (2, 2))


@pytest.mark.parametrize("workers", [1, 3])
def test_tiles_and_threads(workers: int) -> None:
    """In tensors of many tiles too, at the edges of tiles and with thresholds over the model."""
    random = np.random.default_rng(0)
    name, size = "layers.0.up.weight", 1_500_001
    base = {name: random.standard_normal(size, np.float32)}
    one, two = ({name: base[name] + random.standard_normal(size, np.float32) / 8} for _ in "ab")
    places = [0, 65_535, 65_536, 1_048_575, 1_048_576, size - 1]
    bad, still = ({name: two[name].copy()} for _ in "ab")
    bad[name][places] = np.nan
    still[name][places] = base[name][places]

    found = merged("ties", [one, bad], base, allow_nonfinite=True, memory="128MiB", workers=workers)

    assert_nan_only_at(found, merged("ties", [one, still], base), name, *places)


def test_overflow_is_no_input() -> None:
    """Finite entries whose difference overflows are still refused: no model is to blame."""
    base = {"w.weight": np.full((2, 2), -3e38, F32)}
    with pytest.raises(MergebenchError, match="exceeds float32"):
        merged("ties", [{"w.weight": np.full((2, 2), 3e38, F32)}], base, allow_nonfinite=True)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """One of everything, and fine-tunes with entries that are not finite."""
    made = build_scene(tmp_path)
    bad = with_entry(made.tuned[1], VECTOR, [3, 4], [np.nan, np.inf])
    write(tmp_path / "bad.safetensors", with_entry(bad, MATRIX, (0, 1), -np.inf))
    return made


def test_summary_and_json(scene: Scene) -> None:
    """Which tensor, which model, how many: in words and as data, for every output."""
    common = ("merge", "ft1", "bad.safetensors", "-b", "base", "-m", "ties")
    before = listing(scene.path)
    assert_refused(call(*common, cwd=scene.path), "bad.safetensors", "--allow-nonfinite")
    assert listing(scene.path) == before

    ran = assert_done(call(*common, "--allow-nonfinite", "-o", "one", cwd=scene.path))
    for name, count in ((VECTOR, 2), (MATRIX, 1)):
        assert f"not finite in {name}, passed through as NaN: {count} of bad.safe" in ran.out
    several = ("-p", "lam=0.5,1", "-o", "two", "--json", "--allow-nonfinite")
    data = assert_done(call(*common, *several, cwd=scene.path)).json
    for output in data["outputs"]:
        assert output["nonfinite"] == {
            VECTOR: {"bad.safetensors": 2}, MATRIX: {"bad.safetensors": 1},
        }  # fmt: skip
    assert np.isnan(read(scene.path / "one")[VECTOR]).nonzero()[0].tolist() == [3, 4]


def test_recipe_keeps_the_choice(scene: Scene) -> None:
    """The stored recipe gives the same bytes; without the key it is refused."""
    common = ("merge", "ft1", "bad.safetensors", "-b", "base", "-m", "ties", "-o", "one")
    assert_done(call(*common, "--allow-nonfinite", cwd=scene.path))
    recipe = "one/mergebench_recipe.yaml"
    text = (scene.path / recipe).read_text()
    assert "allow_nonfinite: true\n" in text

    assert_done(call("run", recipe, "-o", "two", cwd=scene.path))
    assert_same(read(scene.path / "two"), read(scene.path / "one"))
    (scene.path / "r.yaml").write_text(text.replace("allow_nonfinite: true\n", ""))
    assert_refused(call("run", "r.yaml", "-o", "three", cwd=scene.path), "bad.safetensors")


def test_base_is_counted_once(scene: Scene) -> None:
    """What is wrong with the base is said of the base, under fine-tunes and adapters."""
    write(scene.path / "bad-base.safetensors", with_entry(scene.base, MATRIX, (5, 6), np.nan))
    for models in (("ft1", "ft2"), ("lora1", "lora2"), ("ft1", "lora1")):
        common = ("merge", *models, "-b", "bad-base.safetensors", "-m", "ties", "-o", "out", "-f")
        ran = assert_done(call(*common, "--allow-nonfinite", "--json", cwd=scene.path))
        assert ran.json["outputs"][0]["nonfinite"] == {MATRIX: {"the base": 1}}
        found = read(scene.path / "out")
        assert np.argwhere(np.isnan(found[MATRIX])).tolist() == [[5, 6]]


@pytest.mark.parametrize("form", [(), ("-b", "base"), ("--as", "delta")], ids=str)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_factors_are_refused(scene: Scene, method: str, form: tuple[str, ...]) -> None:
    """One bad number in a factor is a bad row of the update: no entry to pass through."""
    made = factors(9)
    module = MATRIX.removesuffix(".weight")
    made[module][0][1, 2] = np.nan
    save_peft(scene.path / "spoilt", made)
    before = listing(scene.path)

    ran = call("merge", "lora1", "spoilt", "-m", method, *form, "--allow-nonfinite", cwd=scene.path)

    assert_refused(ran, "spoilt", MATRIX, "1 NaN", "row or column", "does not pass on")
    assert listing(scene.path) == before


def test_computed_updates_are_refused() -> None:
    """What other adapters make of a bad number is no single entry either."""

    def block(rows: slice, columns: slice) -> Array:
        return np.full((rows.stop - rows.start, columns.stop - columns.start), np.nan)

    update = Dense(Computed((4, 4), block))
    item = Item(Site("up.weight", (4, 4)), (update,), (1.0,), ("loha",), None, lenient=True)
    with pytest.raises(MergebenchError, match=r"loha: tensor 'up\.weight' has 16 NaN.*not pass on"):
        load(item, 0, 16)


def test_every_row_is_computed_once_for_the_count() -> None:
    """Rows longer than the pieces in which stored entries are counted."""
    asked: list[range] = []

    def block(rows: slice, columns: slice) -> Array:
        assert (columns.start, columns.stop) == (0, 30_000)
        asked.append(range(rows.start, rows.stop))
        return np.where(np.arange(rows.start, rows.stop)[:, None] == 11, np.nan, np.zeros(30_000))

    tensor = Computed((20, 30_000), block)
    item = Item(Site("w", (20, 30_000)), (Dense(tensor),), (1.0,), ("a",), None, lenient=True)

    assert passed_through(item) == {"a": 30_000}
    assert asked == [range(8), range(8, 16), range(16, 20)]


def test_what_is_copied_stays_as_it_is(scene: Scene) -> None:
    """No method sees a tensor that no input changes: its bytes pass, in another dtype too."""
    base = with_entry(scene.base, VECTOR, [0, 1, 2], [np.nan, np.inf, -np.inf])
    write(scene.path / "odd.safetensors", base)
    common = ("merge", "lora1", "-b", "odd.safetensors", "-m", "ties")

    assert_done(call(*common, "-o", "plain.safetensors", cwd=scene.path))
    kept = read(scene.path / "plain.safetensors")
    assert_same({"": kept[VECTOR]}, {"": base[VECTOR]})
    before = listing(scene.path)
    half = ("--dtype", "bf16", "-o", "half.safetensors")
    assert_refused(call(*common, *half, cwd=scene.path), VECTOR, "do not fit")
    assert listing(scene.path) == before
    assert_done(call(*common, *half, "--allow-nonfinite", cwd=scene.path))
    kept = read(scene.path / "half.safetensors")
    np.testing.assert_array_equal(
        kept[VECTOR].astype(F32), base[VECTOR].astype(BF16).astype(F32), strict=True
    )


def test_saved_task_vector_brings_its_nan(scene: Scene) -> None:
    """From model to task vector to model, the entry stays where it was."""
    common = ("-m", "task_arithmetic", "--allow-nonfinite")
    first = ("merge", "bad.safetensors", "-b", "base", "--as", "delta", "-o", "tau.safetensors")
    ran = assert_done(call(*first, *common, "--json", cwd=scene.path))
    assert ran.json["outputs"][0]["nonfinite"] == {
        VECTOR: {"bad.safetensors": 2}, MATRIX: {"bad.safetensors": 1},
    }  # fmt: skip

    assert_done(
        call("merge", "tau.safetensors", "-b", "base", *common, "-o", "back", cwd=scene.path)
    )
    found = read(scene.path / "back")
    assert np.isnan(found[VECTOR]).nonzero()[0].tolist() == [3, 4]
    assert np.argwhere(np.isnan(found[MATRIX])).tolist() == [[0, 1]]
    assert sum(int(np.isnan(a).sum()) for a in found.values() if a.dtype.kind == "f") == 3


def test_counts_survive_an_interruption(scene: Scene) -> None:
    """What an earlier run has passed through is told by the one that ends."""
    recipe = Recipe(
        models=tuple(ModelRef(str(scene.path / name)) for name in ("ft1", "bad.safetensors")),
        method="task_arithmetic",
        base=str(scene.path / "base"),
        allow_nonfinite=True,
        out=str(scene.path / "out"),
    )

    def stop(what: str, done: int, total: int) -> None:
        if done > 0.9 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(make_plan(recipe, workers=1), progress=stop)
    said: list[str] = []
    written = execute(make_plan(recipe, workers=1), note=said.append)

    assert "resuming an interrupted run" in said[0]
    assert json.loads(json.dumps(dict(written[0].nonfinite))) == {
        VECTOR: {str(scene.path / "bad.safetensors"): 2},
        MATRIX: {str(scene.path / "bad.safetensors"): 1},
    }
