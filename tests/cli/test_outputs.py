"""Where outputs go: dtypes, shards, places that exist, and recipes run again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.helpers.compare import assert_close, assert_files
from tests.helpers.files import BF16, F16, F32, F64, listing, read, tree
from tests.helpers.models import added
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

RECIPE = "mergebench_recipe.yaml"


@pytest.mark.parametrize(
    ("word", "dtype", "relative"),
    [("bf16", BF16, 2**-8), ("f16", F16, 2**-11), ("f32", F32, 1e-6), ("f64", F64, 1e-6)],
)
def test_dtype_of_the_merged_tensors(scene: Scene, word: str, dtype: Any, relative: float) -> None:
    """--dtype stores the merged tensors so, rounded once, and leaves integers alone."""
    ran = call(
        *("merge", "ft1", "ft2", "-b", "base", "-m", "task_arithmetic", "-o", "out"),
        *("--dtype", word),
        cwd=scene.path,
    )

    assert_done(ran)
    merged = read(scene.path / "out")
    one, two = scene.taus
    assert_close(merged, added(scene.base, {n: one[n] + two[n] for n in one}), relative)
    assert {array.dtype for name, array in merged.items() if name in one} == {dtype}
    assert merged["model.position_ids"].dtype.kind == "i"


def test_shards_and_their_index(scene: Scene) -> None:
    """--shard-size splits into files no larger than asked, each tensor in the index."""
    assert_done(call("merge", "ft1", "ft2", "-o", "out", "--shard-size", "3kB", cwd=scene.path))

    out = scene.path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for file in files:
        held = read(out / file)
        assert sorted(held) == sorted(n for n, f in index["weight_map"].items() if f == file)
        assert sum(array.nbytes for array in held.values()) <= 3000
    assert sorted(index["weight_map"]) == sorted(scene.base)


def test_shards_need_a_folder(scene: Scene) -> None:
    """A single file cannot be sharded; the error says what is needed."""
    ran = call("merge", "ft1", "ft2", "-o", "x.safetensors", "--shard-size", "1kB", cwd=scene.path)

    assert_refused(ran, "--shard-size", "folder", "x.safetensors")


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_existing_output_is_refused_and_forced(scene: Scene, out: str) -> None:
    """An output that exists stays as it is, unless --force replaces it whole."""
    common = ("merge", "ft1", "ft2", "-b", "base", "-o", out)
    assert_done(call(*common, cwd=scene.path))
    before = tree(scene.path)

    refused = call(*common, "-m", "ties", cwd=scene.path)
    assert_refused(refused, f"{out}: exists already", "--force")
    assert_files(tree(scene.path), before)

    assert_done(call(*common, "-m", "ties", "--force", cwd=scene.path))
    after = tree(scene.path)
    assert sorted(after) == sorted(before)
    name = out if out.endswith("s") else f"{out}/model.safetensors"
    assert after[name] != before[name]


def test_force_replaces_shards_by_one_file(scene: Scene) -> None:
    """No shard of the replaced model stays behind."""
    common = ("merge", "ft1", "ft2", "-o", "out")
    assert_done(call(*common, "--shard-size", "2kB", cwd=scene.path))
    assert_done(call(*common, "--force", cwd=scene.path))

    weights = [name for name in listing(scene.path / "out") if "safetensors" in name]
    assert weights == ["model.safetensors"]


def test_force_spares_what_is_not_a_model(scene: Scene) -> None:
    """--force does not delete a folder with other files in it."""
    (scene.path / "papers").mkdir()
    (scene.path / "papers" / "thesis.tex").write_text("years of work")
    before = tree(scene.path)

    ran = call("merge", "ft1", "ft2", "-o", "papers", "--force", cwd=scene.path)

    assert_refused(ran, "papers", "thesis.tex")
    assert_files(tree(scene.path), before)


@pytest.mark.parametrize("out", ["ft1", "base", "ft2.safetensors", "ft1/inside"])
def test_inputs_are_never_overwritten(scene: Scene, out: str) -> None:
    """An output in the place of an input, or inside one, is refused whatever --force says."""
    before = tree(scene.path)

    ran = call(
        *("merge", "ft1", "ft2.safetensors", "-b", "base", "-m", "ties", "-o", out, "--force"),
        cwd=scene.path,
    )

    assert_refused(ran, f"{out}: the output would replace", "-o")
    assert_files(tree(scene.path), before)


@pytest.mark.parametrize(
    "arguments",
    [
        ("ft1:0.5", "ft2", "-b", "base", "-m", "ties", "-p", "density=0.3", "--dtype", "bf16"),
        ("ft1", "ft2", "--shard-size", "2kB", "--then", "scale:lam=0.5"),
        ("lora1", "lora2:2", "-m", "breadcrumbs", "--compat", "official"),
        ("lora1", "ft2", "-b", "base", "--as", "delta", "-m", "task_arithmetic"),
    ],
)
def test_stored_recipe_gives_the_same_bytes(scene: Scene, arguments: tuple[str, ...]) -> None:
    """The recipe inside an output, run again, writes that output again, every file of it."""
    assert_done(call("merge", *arguments, "-o", "one/out", cwd=scene.path))
    assert_done(call("run", f"one/out/{RECIPE}", "-o", "two/out", cwd=scene.path))

    assert_done(call("run", "one/out", "-o", "three/out", cwd=scene.path))

    assert_files(tree(scene.path / "two" / "out"), tree(scene.path / "one" / "out"))
    assert_files(tree(scene.path / "three" / "out"), tree(scene.path / "one" / "out"))


def test_recipe_states_every_parameter(scene: Scene) -> None:
    """The stored recipe holds expanded values, so that later defaults cannot change it."""
    assert_done(call("merge", "ft1:0.5", "ft2", "-b", "base", "-m", "breadcrumbs", cwd=scene.path))

    stored = yaml.safe_load((scene.path / "merged" / RECIPE).read_text())
    stored["models"].sort(key=lambda model: model["path"])
    assert stored == {
        "mergebench": 1,
        "method": "breadcrumbs",
        "params": {
            "density": 0.2,
            "gamma": 0.1,
            "lam": 0.4,
            "scope": "row",
            "count": "at_least_one",
            "conflict": "drop",
            "normalize": False,
        },
        "models": [{"path": "ft1", "weight": 0.5}, {"path": "ft2", "weight": 1.0}],
        "base": "base",
    }


def test_recipes_by_hand(scene: Scene) -> None:
    """A recipe names models as text or with weights, ops instead of a method, and lists."""
    recipe = scene.path / "recipe.yaml"
    recipe.write_text(
        "models: [ft1, {path: ft2, weight: 0.5}]\n"
        "base: base\n"
        "ops: [weigh, sum]\n"
        "then: {scale: {lam: 2}}\n"
        "out: made.safetensors\n"
    )
    assert_done(call("run", "recipe.yaml", cwd=scene.path))
    as_json = {
        "models": ["ft1"],
        "base": "base",
        "method": "task_arithmetic",
        "params": {"lam": [1, 2]},
    }
    (scene.path / "recipe.json").write_text(json.dumps(as_json))
    assert_done(call("run", "recipe.json", "-o", "swept", cwd=scene.path))

    one, two = scene.taus
    expected = added(scene.base, {name: 2 * one[name] + two[name] for name in one})
    assert_close(read(scene.path / "made.safetensors"), expected)
    doubled = added(scene.base, {name: 2 * one[name] for name in one})
    assert_close(read(scene.path / "swept" / "lam=2"), doubled)
    assert listing(scene.path / "swept") == ["lam=1", "lam=2"]
