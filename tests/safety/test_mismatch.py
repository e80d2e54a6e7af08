"""Tensors that a model lacks, has in another shape, or has alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.files import BF16, F32, F64, Array, listing, read, write
from tests.helpers.models import save_folder
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import build_scene

NAMES = ("layers.0.a.weight", "layers.0.b.weight", "layers.1.a.weight")


def arrays(seed: int, scale: float = 1.0) -> dict[str, Array]:
    """Three small matrices."""
    random = np.random.default_rng(seed)
    return {name: (scale * random.standard_normal((3, 4))).astype(F32) for name in NAMES}


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, dict[str, dict[str, Array]]]:
    """A base; ft1 lacks a tensor and has two extra ones; ft2 has one in another shape."""
    base = arrays(0)
    one = {name: base[name] + step for name, step in arrays(1, 0.1).items()}
    two = {name: base[name] + step for name, step in arrays(2, 0.1).items()}
    del one["layers.0.b.weight"]
    one["extra.weight"] = np.full((2, 2), 3, F32)
    one["only.weight"] = np.arange(6, dtype=F32).reshape(2, 3)
    two["layers.1.a.weight"] = np.ones((5, 4), F32)
    two["extra.weight"] = np.full((2, 2), 5, F32)
    models = {"base": base, "ft1": one, "ft2": two}
    for name, model in models.items():
        write(tmp_path / f"{name}.safetensors", model)
    return tmp_path, models


def merged(path: Path, policy: str, *extra: str) -> dict[str, Array]:
    """Task arithmetic with λ = 1 and weights 0.5 and 2."""
    out = f"out-{policy}.safetensors"
    assert_done(
        call(
            *("merge", "ft1.safetensors:0.5", "ft2.safetensors:2", "--base", "base.safetensors"),
            *("-m", "task_arithmetic", "--on-mismatch", policy, "-o", out, *extra),
            cwd=path,
        )
    )
    return read(path / out)


def assert_is(found: Array, expected: Any, tolerance: float = 1e-6) -> None:
    """Equal shapes, and values to float32 rounding."""
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found.astype(F64), expected, rtol=0, atol=tolerance)


def test_the_default_names_the_way_out(place: Any) -> None:
    """Missing tensors and other shapes are refused, each with the option that helps."""
    path, _ = place
    before = listing(path)
    common = ("--base", "base.safetensors", "-m", "task_arithmetic", "-o", "x")
    ran = call("merge", "ft1.safetensors", *common, cwd=path)
    assert_refused(ran, "layers.0.b.weight", "1 tensors are missing", "--on-mismatch")
    ran = call("merge", "ft2.safetensors", *common, cwd=path)
    assert_refused(ran, "layers.1.a.weight", "3×4", "5×4", "--on-mismatch")
    assert_refused(call("merge", "ft2.safetensors", *common, "--on-mismatch", "bse", cwd=path),
                   "--on-mismatch", "did you mean 'base'?")  # fmt: skip
    assert listing(path) == before


def test_base(place: Any) -> None:
    """What does not match in some model has the base's bytes; the rest is merged."""
    path, models = place
    found = merged(path, "base")
    base, one, two = (models[name] for name in ("base", "ft1", "ft2"))
    assert sorted(found) == sorted(NAMES)
    for name in NAMES[1:]:
        assert found[name].tobytes() == base[name].tobytes()
    first = NAMES[0]
    step = 0.5 * (one[first].astype(F64) - base[first]) + 2 * (two[first].astype(F64) - base[first])
    assert_is(found[first], base[first] + step)


def test_skip(place: Any) -> None:
    """The model that does not match moves nothing there; the other one does."""
    path, models = place
    found = merged(path, "skip")
    base, one, two = (models[name] for name in ("base", "ft1", "ft2"))
    assert sorted(found) == sorted(NAMES)
    b, c = NAMES[1:]
    assert_is(found[b], base[b] + 2 * (two[b].astype(F64) - base[b]))
    assert_is(found[c], base[c] + 0.5 * (one[c].astype(F64) - base[c]))


def test_union(place: Any) -> None:
    """Extra tensors are added: equal or single ones as they are, others as weighted means."""
    path, models = place
    found = merged(path, "union")
    assert sorted(found) == sorted((*NAMES, "extra.weight", "only.weight"))
    assert found["only.weight"].tobytes() == models["ft1"]["only.weight"].tobytes()
    assert_is(found["extra.weight"], np.full((2, 2), (0.5 * 3 + 2 * 5) / 2.5))
    skipped = merged(path, "skip")
    for name in NAMES:
        assert found[name].tobytes() == skipped[name].tobytes()


def test_weights_of_whole_models_do_not_take_part(place: Any) -> None:
    """In weight space a model that lacks a tensor counts for nothing, not as zeros."""
    path, models = place
    arguments = ("merge", "ft2.safetensors:2", "ft1.safetensors:0.5", "-m", "linear")
    assert_done(call(*arguments, "--on-mismatch", "union", "-o", "m.safetensors", cwd=path))
    found = read(path / "m.safetensors")
    one, two = models["ft1"], models["ft2"]
    first = NAMES[0]
    assert_is(found[first], (2 * two[first].astype(F64) + 0.5 * one[first]) / 2.5)
    assert_is(found["layers.0.b.weight"], two["layers.0.b.weight"])


def test_everything_is_reported(place: Any) -> None:
    """Model, tensor, what and fate in the plan; a note for each model."""
    path, _ = place
    common = ("--base", "base.safetensors", "-m", "ties", "--json")
    ran = call("plan", "ft1.safetensors", "ft2.safetensors", *common, "--on-mismatch", "union",
               cwd=path)  # fmt: skip
    plan = assert_done(ran).json
    odd = {(e["model"][:3], e["tensor"], e["what"], e["fate"]) for e in plan["mismatches"]}
    assert odd == {
        ("ft1", "layers.0.b.weight", "missing", "do not take part"),
        ("ft1", "extra.weight", "extra", "are added"),
        ("ft1", "only.weight", "extra", "are added"),
        ("ft2", "layers.1.a.weight", "shape", "do not take part"),
        ("ft2", "extra.weight", "extra", "are added"),
    }
    assert (
        "ft1.safetensors: 1 tensors are missing (layers.0.b.weight) and do not take part"
        in (plan["notes"])
    )
    copied = plan["tensors"]["copied"]
    assert copied["only.weight"] == "only in ft1.safetensors"
    assert copied["extra.weight"].endswith("their weighted mean")


def test_base_needs_a_base(place: Any) -> None:
    """There is nothing else to take tensors from."""
    path, _ = place
    arguments = ("merge", "ft1.safetensors", "ft2.safetensors", "-o", "x")
    ran = call(*arguments, "--on-mismatch", "base", cwd=path)
    assert_refused(ran, "--on-mismatch base takes tensors from the base", "add --base")


def test_integers_come_from_the_base(tmp_path: Path) -> None:
    """Buffers that differ are refused, and with ``base`` they are the base's."""
    base = {"w": np.ones((2, 2), F32), "ids": np.arange(3)}
    write(tmp_path / "base.safetensors", base)
    write(tmp_path / "ft.safetensors", {"w": base["w"] * 2, "ids": np.arange(3)[::-1].copy()})
    arguments = ("merge", "ft.safetensors", "-b", "base.safetensors", "-m", "task_arithmetic")
    assert_refused(call(*arguments, "-o", "x", cwd=tmp_path), "ids: I64 tensors", "must agree")
    assert_done(call(*arguments, "--on-mismatch", "base", "-o", "m.safetensors", cwd=tmp_path))
    found = read(tmp_path / "m.safetensors")
    assert found["ids"].tolist() == [0, 1, 2]
    assert found["w"].tolist() == [[2, 2], [2, 2]]


def test_extra_tensors_of_different_shapes(tmp_path: Path) -> None:
    """Two heads of different size have no union."""
    base = {"w": np.ones((2, 2), BF16)}
    write(tmp_path / "base.safetensors", base)
    for number in (1, 2):
        extra = {"score.weight": np.ones((number, 2), BF16)}
        write(tmp_path / f"ft{number}.safetensors", base | extra)
    arguments = ("merge", "ft1.safetensors", "ft2.safetensors", "-b", "base.safetensors")
    ran = call(*arguments, "--on-mismatch", "union", "-o", "x", cwd=tmp_path)
    assert_refused(ran, "score.weight: (1, 2)", "(2, 2)", "--on-mismatch skip")
    assert_done(call(*arguments, "--on-mismatch", "skip", "-o", "m.safetensors", cwd=tmp_path))
    assert list(read(tmp_path / "m.safetensors")) == ["w"]


def test_weights_that_differ_between_tensors(place: Any) -> None:
    """Means of added tensors follow gradients and rules too."""
    path, _ = place
    arguments = ("merge", "ft1.safetensors", "ft2.safetensors", "-b", "base.safetensors")
    union = ("--on-mismatch", "union", "-m", "task_arithmetic", "-o", "w.safetensors", "--force")
    for weights in (("--where", "extra:weight=3/1"), ("--where", "layers:weight=9/9", "--where",
                                                      "extra:weight=3/1")):  # fmt: skip
        assert_done(call(*arguments, *union, *weights, cwd=path))
        assert_is(read(path / "w.safetensors")["extra.weight"], np.full((2, 2), (9 + 5) / 4))


def test_base_holds_for_adapters_too(tmp_path: Path) -> None:
    """A tensor that one model lacks comes from the base, whatever an adapter would do to it."""
    scene = build_scene(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    less = {key: array for key, array in scene.tuned[0].items() if key != name}
    write(tmp_path / "less.safetensors", less)
    arguments = ("merge", "less.safetensors", "lora1", "-b", "base", "-m", "task_arithmetic")
    assert_done(call(*arguments, "--on-mismatch", "base", "-o", "out", cwd=tmp_path))
    found = read(tmp_path / "out" / "model.safetensors")
    assert found[name].tobytes() == scene.base[name].tobytes()
    other = "model.layers.1.mlp.up_proj.weight"
    step = scene.taus[0][other] + scene.updates[0][other]
    assert_is(found[other], scene.base[other] + step, 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_model_stands_in_for_a_base(tmp_path: Path, seed: int) -> None:
    """Its config is written, so its tensors are, whatever the models' fingerprints."""
    random = np.random.default_rng(seed)
    small = {"layers.0.w.weight": random.standard_normal((2, 2)).astype(F32)}
    big = small | {"layers.1.w.weight": random.standard_normal((2, 2)).astype(F32)}
    save_folder(tmp_path / "big", big, {"layers": 2})
    save_folder(tmp_path / "small", small, {"layers": 1})
    for first, second in (("big", "small"), ("small", "big")):
        arguments = ("merge", first, second, "-m", "linear", "--on-mismatch", "skip", "--force")
        assert_done(call(*arguments, "-o", "out", cwd=tmp_path))
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert len(read(tmp_path / "out" / "model.safetensors")) == config["layers"]


def test_nonfinite_entries_of_added_tensors(place: Any) -> None:
    """They are refused by name, and passed through where that is asked for."""
    path, models = place
    bad = {**models["ft1"], "extra.weight": np.array([[np.nan, 1], [2, 3]], F32)}
    write(path / "bad.safetensors", bad)
    arguments = ("merge", "bad.safetensors", "ft2.safetensors", "-b", "base.safetensors")
    union = ("--on-mismatch", "union", "-m", "task_arithmetic", "-o", "n.safetensors")
    ran = call(*arguments, *union, cwd=path)
    assert ran.code == 2
    assert "bad.safetensors: tensor 'extra.weight' has 1 entries of 4" in ran.err
    assert_done(call(*arguments, *union, "--allow-nonfinite", cwd=path))
    found = read(path / "n.safetensors")["extra.weight"]
    assert np.isnan(found).tolist() == [[True, False], [False, False]]
    assert found[1].tolist() == [3.5, 4]


def test_weights_that_leave_nobody(place: Any) -> None:
    """A tensor that only models of weight zero have is found while planning."""
    path, _ = place
    arguments = ("plan", "ft2.safetensors:0", "ft1.safetensors:1", "-m", "linear")
    ran = call(*arguments, "--on-mismatch", "skip", cwd=path)
    assert_refused(ran, "mean: the weights sum to zero")


def test_statistics_take_no_part_either(tmp_path: Path) -> None:
    """A model without a running variance does not count in its mean, in any space."""
    base = {"bn.weight": np.ones(3, F32), "bn.running_var": np.full(3, 8, F32)}
    have = {"bn.weight": np.full(3, 2, F32), "bn.running_var": np.full(3, 2, F32)}
    write(tmp_path / "base.safetensors", base)
    write(tmp_path / "have.safetensors", have)
    write(tmp_path / "lack.safetensors", {"bn.weight": np.full(3, 3, F32)})
    arguments = ("merge", "have.safetensors", "lack.safetensors", "-b", "base.safetensors")
    skip = ("--on-mismatch", "skip", "-o", "out.safetensors", "--force")
    for method in ("task_arithmetic", "linear"):
        assert_done(call(*arguments, "-m", method, *skip, cwd=tmp_path))
        found = read(tmp_path / "out.safetensors")
        assert found["bn.running_var"].tolist() == [2, 2, 2]


def test_recipes_keep_the_policies(place: Any) -> None:
    """The stored recipe gives the same bytes."""
    path, _ = place
    arguments = ("merge", "ft1.safetensors", "ft2.safetensors", "-b", "base.safetensors")
    assert_done(call(*arguments, "--on-mismatch", "union", "-o", "one", cwd=path))
    assert "on_mismatch: union" in (path / "one" / "mergebench_recipe.yaml").read_text()
    assert_done(call("run", "one", "-o", "two", cwd=path))
    weights = "model.safetensors"
    assert (path / "one" / weights).read_bytes() == (path / "two" / weights).read_bytes()
