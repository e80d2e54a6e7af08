"""The same merge gives the same bytes, whatever stands around it."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from tests.helpers.compare import assert_files, assert_same
from tests.helpers.files import BF16, read, tree, write
from tests.helpers.models import base_model, fine_tune, save_folder
from tests.helpers.running import assert_done, call
from tests.helpers.scene import Scene, build_scene

METHODS = [
    ("-m", "linear"),
    ("-m", "task_arithmetic", "-p", "lam=0.7"),
    ("-m", "ties", "-p", "density=0.4"),
    ("-m", "ties", "-p", "scope=tensor"),
    ("-m", "ties", "-p", "scope=row", "--then", "scale:lam=0.5"),
    ("-m", "breadcrumbs"),
    ("-m", "breadcrumbs", "-p", "scope=model"),
]


@pytest.fixture
def half(tmp_path: Path) -> Scene:
    """The usual folder in bfloat16, with a third fine-tune that has ties with the first."""
    scene = build_scene(tmp_path, BF16)
    third = fine_tune(scene.base, 1, size=0.1)
    third["model.norm.weight"] = fine_tune(scene.base, 5)["model.norm.weight"]
    write(tmp_path / "ft3.safetensors", third)
    return scene


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_second_run(half: Scene, method: tuple[str, ...]) -> None:
    """Every file of an output is the same on a second run."""
    for place in ("one/out", "two/out"):
        ran = call("merge", "ft1:0.3", "ft2", "-b", "base", *method, "-o", place, cwd=half.path)
        assert_done(ran)

    assert_files(tree(half.path / "one"), tree(half.path / "two"))


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_any_number_of_workers(half: Scene, method: tuple[str, ...]) -> None:
    """Workers and memory change nothing, not even the files beside the weights."""
    trees = []
    for number, options in enumerate([("1",), ("2",), ("7",), ("3", "--memory", "100MiB")]):
        place = half.path / str(number) / "out"
        ran = call(
            *("merge", "ft1", "ft2", "-b", "base", *method, "-o", place, "--workers", *options),
            cwd=half.path,
        )
        assert_done(ran)
        trees.append(tree(place))

    for other in trees[1:]:
        assert_files(other, trees[0])


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_any_order_of_models(half: Scene, method: tuple[str, ...]) -> None:
    """Models may be named in any order, each with its weight."""
    models = ("ft1.safetensors:0.3", "ft2.safetensors", "ft3.safetensors:0.7")
    written = set()
    for number, order in enumerate(permutations(models)):
        out = half.path / str(number)
        assert_done(call("merge", *order, "-b", "base", *method, "-o", out, cwd=half.path))
        written.add((out / "model.safetensors").read_bytes())

    assert len(written) == 1


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_any_shards_of_the_inputs(half: Scene, method: tuple[str, ...]) -> None:
    """Inputs cut into other shards, or with tensors in another order, merge to the same file."""
    save_folder(half.path / "ft1-sharded", half.tuned[0], shards=3)
    save_folder(half.path / "base-sharded", half.base, shards=4)
    backwards = dict(reversed(list(half.tuned[1].items())))
    write(half.path / "ft2-backwards.safetensors", backwards)
    whole = ("merge", "ft1", "ft2", "-b", "base", *method, "-o", "whole")
    parts = ("merge", "ft1-sharded", "ft2-backwards.safetensors", "-b", "base-sharded", *method)

    assert_done(call(*whole, cwd=half.path))
    assert_done(call(*parts, "-o", "parts", cwd=half.path))

    one, two = (half.path / name / "model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()


def test_any_shards_of_the_output(half: Scene) -> None:
    """The values do not depend on how the output is cut."""
    common = ("merge", "ft1", "ft2", "-b", "base", "-m", "ties")
    assert_done(call(*common, "-o", "whole", cwd=half.path))
    assert_done(call(*common, "-o", "parts", "--shard-size", "1kB", cwd=half.path))

    assert_same(read(half.path / "parts"), read(half.path / "whole"))


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_any_order_of_adapters(half: Scene, method: tuple[str, ...]) -> None:
    """Adapters too may be named in any order."""
    written = []
    for number, order in enumerate(permutations(("lora1:0.4", "lora2"))):
        out = half.path / str(number)
        assert_done(call("merge", *order, *method, "-o", out, cwd=half.path))
        written.append((out / "adapter_model.safetensors").read_bytes())

    assert written[0] == written[1]


def test_single_file_does_not_depend_on_the_order(half: Scene) -> None:
    """A single file carries its recipe, and is the same file for any order of models."""
    written = []
    for number, order in enumerate(permutations(("ft1.safetensors:0.3", "ft2.safetensors"))):
        out = half.path / str(number) / "out.safetensors"
        assert_done(call("merge", *order, "-b", "base.safetensors", "-o", out, cwd=half.path))
        written.append(out.read_bytes())

    assert written[0] == written[1]


def test_single_file_without_base_does_not_depend_on_the_order(half: Scene) -> None:
    """Nothing is taken from the first model then but values."""
    written = set()
    for number, order in enumerate(permutations(("ft1.safetensors:0.3", "ft2.safetensors"))):
        out = half.path / str(number) / "out.safetensors"
        assert_done(call("merge", *order, "-o", out, cwd=half.path))
        written.add(out.read_bytes())

    assert len(written) == 1


@pytest.mark.parametrize("order", list(permutations(("ft1", "ft2"))))
def test_stored_recipe_keeps_the_first_model(half: Scene, order: tuple[str, str]) -> None:
    """Without a base the first model gives the files beside the weights, on every run."""
    for name in order:
        (half.path / name / "generation_config.json").write_text(f'{{"made_by": "{name}"}}')

    assert_done(call("merge", *order, "-o", "one/out", cwd=half.path))
    assert_done(call("run", "one/out", "-o", "two/out", cwd=half.path))

    for out in ("one/out", "two/out"):
        text = (half.path / out / "generation_config.json").read_text()
        assert text == f'{{"made_by": "{order[0]}"}}'
    assert_files(tree(half.path / "one"), tree(half.path / "two"))


def test_merge_with_the_base_itself(tmp_path: Path) -> None:
    """Merging copies of the base gives the base back, negative zeros included."""
    base = base_model(dtype=BF16)
    base["model.norm.weight"][:4] = -0.0
    for name in ("base", "copy1", "copy2"):
        save_folder(tmp_path / name, base)
    for method in METHODS:
        ran = call("merge", "copy1", "copy2", "-b", "base", *method, "-o", "o", "-f", cwd=tmp_path)
        assert_done(ran)
        assert_same(read(tmp_path / "o"), base)
