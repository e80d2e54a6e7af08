"""Packed files: what compressing keeps, and that all that takes task vectors takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import mergebench
from mergebench import load, merge_models
from mergebench.core.delta import LowRank, tile
from mergebench.core.tensor import size_of
from tests.helpers.adapters import factors, save_kohya, save_peft
from tests.helpers.files import F32, read, tree, write
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

SCHEMES = ("ternary", "one-bit", "two-bit", "sparse", "lowrank", "lowrank+ternary")


def pack(scene: Scene, model: str, *more: Any, out: str = "p.mbz.safetensors") -> Any:
    """The report of a compression, as JSON."""
    return assert_done(call("compress", model, "-o", out, *more, "--json", cwd=scene.path)).json


def updates(path: Path) -> dict[str, Any]:
    """Every displacement of a file in full, in float64."""
    found: Any = load(path)
    wide = np.dtype(np.float64)
    return {
        name: tile(delta, 0, size_of(delta.shape), wide).reshape(delta.shape)
        for name, delta in found.items()
    }


def assert_error(report: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    """The reported errors are those of the files."""
    apart = sum(np.sum((before[name] - after[name]) ** 2) for name in before)
    own = sum(np.sum(array**2) for array in before.values())
    assert report["relative_error"] == pytest.approx(np.sqrt(apart / own), rel=1e-5)
    flat = [np.concatenate([each[n].ravel() for n in before]) for each in (before, after)]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert report["cosine"] == pytest.approx(cosine, rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reported_errors_of_adapters_are_those_of_the_update(scene: Scene, scheme: str) -> None:
    """Of ΔW = BA, in total and in the worst module."""
    report = pack(scene, "lora1", "-s", scheme)

    before, after = updates(scene.path / "lora1"), updates(scene.path / "p.mbz.safetensors")
    assert_error(report, before, after)
    worst = max(
        np.linalg.norm(before[n] - after[n]) / np.linalg.norm(before[n]) for n in before
    )  # fmt: skip
    assert report["worst"]["relative_error"] == pytest.approx(worst, rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reported_errors_of_models_are_those_of_the_update(scene: Scene, scheme: str) -> None:
    """Of fine-tuned minus base, and the file holds every tensor of it."""
    report = pack(scene, "ft1", "-b", "base", "-s", scheme)

    after = updates(scene.path / "p.mbz.safetensors")
    assert set(after) == {name for name in scene.base if scene.base[name].dtype.kind == "f"}
    assert_error(report, {name: scene.taus[0][name] for name in after}, after)


def test_ternary_of_a_model_is_compeft(scene: Scene) -> None:
    """The largest fifth of all entries, times their standard deviation, to the last bit."""
    pack(scene, "ft1", "-b", "base")

    tau = {
        name: (scene.tuned[0][name] - array).astype(F32)
        for name, array in scene.base.items()
        if array.dtype.kind == "f"
    }
    names = sorted(tau, key=str.encode)
    flat = np.concatenate([tau[name].ravel() for name in names])
    kept = np.argsort(-np.abs(flat), kind="stable")[: int(0.2 * flat.size)]
    level = np.float32(np.std(flat.astype(np.float64), ddof=1))
    expected = np.zeros(flat.size, F32)
    expected[kept] = np.sign(flat[kept]) * level
    after = updates(scene.path / "p.mbz.safetensors")
    got = np.concatenate([after[name].ravel() for name in names])
    np.testing.assert_array_equal(np.sign(got), np.sign(expected))
    np.testing.assert_allclose(got, expected, rtol=2e-7)


def test_the_choice_of_factors_changes_nothing(scene: Scene) -> None:
    """(B M, M⁻¹ A) is the same update as (B, A), and packs to the same one."""
    random = np.random.default_rng(5)
    made = factors(1)
    turned = {}
    for name, (B, A) in made.items():
        M = random.standard_normal((4, 4)) + 3 * np.eye(4)
        turned[name] = ((B @ M).astype(F32), (np.linalg.inv(M) @ A).astype(F32))
    save_peft(scene.path / "turned", turned)

    pack(scene, "lora1", "-p", "density=0.3")
    pack(scene, "turned", "-p", "density=0.3", out="q.mbz.safetensors")
    same = [updates(scene.path / f"{each}.mbz.safetensors") for each in "pq"]
    for name in same[0]:
        np.testing.assert_allclose(same[0][name], same[1][name], rtol=1e-4, atol=1e-6)

    pack(scene, "lora1", "-p", "compat=official", "-p", "density=0.9", "-f")
    pack(
        scene, "turned", "-p", "compat=official", "-p", "density=0.9", "-f", out="q.mbz.safetensors"
    )
    raw = [updates(scene.path / f"{each}.mbz.safetensors") for each in "pq"]
    assert any(np.abs(raw[0][name] - raw[1][name]).max() > 0.01 for name in raw[0])


@pytest.mark.parametrize(
    "model", ["lora1", "a.safetensors", "tau1.safetensors", "kohya.safetensors"]
)
@pytest.mark.parametrize("scheme", ["ternary", "lowrank+two-bit"])
def test_packed_and_unpacked_are_one(scene: Scene, model: str, scheme: str) -> None:
    """Unpacking writes what reading the packed file gives, under the original names."""
    save_kohya(scene.path / "kohya.safetensors", factors(3))
    pack(scene, model, "-s", scheme)
    assert_done(call("decompress", "p.mbz.safetensors", "-o", "u.safetensors", cwd=scene.path))

    one, two = (updates(scene.path / name) for name in ("p.mbz.safetensors", "u.safetensors"))
    assert one.keys() == two.keys() == updates(scene.path / model).keys()
    for name in one:
        assert one[name].tobytes() == two[name].tobytes()
    if "tau" not in model:
        before = scene.path / model
        before = before / "adapter_model.safetensors" if before.is_dir() else before
        assert load_file(scene.path / "u.safetensors").keys() == load_file(before).keys()


@pytest.mark.parametrize("method", ["ties", "linear", "breadcrumbs"])
def test_merging_packed_is_merging_unpacked(scene: Scene, method: str) -> None:
    """The same bytes, of adapters and of models."""
    for model, more in (("lora1", ()), ("ft1", ("-b", "base"))):
        pack(scene, model, *more, out=f"{model}.mbz.safetensors")
        plain = f"{model}-plain.safetensors"
        assert_done(call("decompress", f"{model}.mbz.safetensors", "-o", plain, cwd=scene.path))

    def merged(first: str, second: str, *more: Any) -> dict[str, Any]:
        out = f"out-{first}.safetensors"
        assert_done(call("merge", first, second, "-m", method, "-o", out, *more, cwd=scene.path))
        return read(scene.path / out)

    for model, second, more in (("lora1", "lora2", ()), ("ft1", "ft2", ("-b", "base"))):
        one = merged(f"{model}.mbz.safetensors", second, *more)
        two = merged(f"{model}-plain.safetensors", second, *more)
        assert one.keys() == two.keys()
        for name in one:
            assert one[name].tobytes() == two[name].tobytes()


def test_a_model_is_written_from_base_and_packed(scene: Scene) -> None:
    """By decompress, by merge, and as base+packed in Python: the base plus the update."""
    pack(scene, "ft1", "-b", "base")
    assert_done(call("decompress", "p.mbz.safetensors", "-b", "base", "-o", "full", cwd=scene.path))

    got = read(scene.path / "full" / "model.safetensors")
    for name, delta in updates(scene.path / "p.mbz.safetensors").items():
        expected = (scene.base[name].astype(F32) + delta.astype(F32)).astype(F32)
        np.testing.assert_array_equal(got[name], expected)
    assert (scene.path / "full" / "config.json").exists()
    pair = f"{scene.path / 'base'}+{scene.path / 'p.mbz.safetensors'}"
    merged = merge_models([pair], method="linear")
    for name in got:
        np.testing.assert_array_equal(np.asarray(merged[name]), got[name])


def test_folders_of_adapters_come_back_with_their_config(scene: Scene) -> None:
    """PEFT's folder: the config as it was, and factors of the same names and shapes."""
    pack(scene, "lora1")
    assert_done(call("decompress", "p.mbz.safetensors", "-o", "back", cwd=scene.path))

    files = tree(scene.path / "back")
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((scene.path / "lora1" / "adapter_config.json").read_text())
    assert json.loads(files["adapter_config.json"]) == config
    before = load_file(scene.path / "lora1" / "adapter_model.safetensors")
    after = load_file(scene.path / "back" / "adapter_model.safetensors")
    assert {n: a.shape for n, a in after.items()} == {n: a.shape for n, a in before.items()}


def test_other_dialects_can_be_asked_for(scene: Scene) -> None:
    """A packed adapter is written for a server as any adapter is."""
    pack(scene, "lora1")
    assert_done(
        call("decompress", "p.mbz.safetensors", "--target", "vllm", "-o", "v", cwd=scene.path)
    )

    one, two = updates(scene.path / "p.mbz.safetensors"), updates(scene.path / "v")
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_every_tool_lists_a_packed_file(scene: Scene) -> None:
    """It is a safetensors file: names, bytes, and what it was packed from."""
    pack(scene, "lora1")

    with safe_open(scene.path / "p.mbz.safetensors", "np") as file:
        names = set(file.keys())
        about = json.loads(file.metadata()["mergebench"])
        assert all(file.get_slice(name).get_dtype() == "U8" for name in names)
    assert names == set(load_file(scene.path / "lora1" / "adapter_model.safetensors"))
    assert about["made"]["scheme"] == "ternary"
    assert about["made"]["relative_error"] > 0


def test_what_is_no_update_is_stored_exactly(scene: Scene) -> None:
    """Heads saved in full, and α: bit for bit, and reported."""
    head = {"lm_head.weight": scene.tuned[0]["lm_head.weight"]}
    save_peft(scene.path / "headed", factors(1), extra=head)
    report = pack(scene, "headed")

    name = "base_model.model.lm_head.weight"
    assert report["exact"] == [name]
    assert_done(call("decompress", "p.mbz.safetensors", "-o", "u.safetensors", cwd=scene.path))
    after = load_file(scene.path / "u.safetensors")
    assert after[name].tobytes() == head["lm_head.weight"].tobytes()


def test_heads_without_counterpart_are_whole_or_left_out(scene: Scene) -> None:
    """Tensors that the base lacks stop it, until the user says which."""
    tuned = {**scene.tuned[0], "score.weight": np.ones((2, 16), F32)}
    write(scene.path / "headed.safetensors", tuned)
    common = ("compress", "headed.safetensors", "-b", "base", "-o", "p.mbz.safetensors")

    assert_refused(call(*common, cwd=scene.path), "score.weight", "--whole")
    report = pack(scene, "headed.safetensors", "-b", "base", "--whole", "class=head")
    assert "score.weight" in report["exact"]
    found: Any = load(scene.path / "p.mbz.safetensors")
    assert found["score.weight"].values.read(0, 32).tolist() == [1.0] * 32


def test_one_vector_of_multipliers_is_packed_around_one(scene: Scene) -> None:
    """(IA)³: what is not kept stays 1."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.ia3_l"
    values = (1 + np.linspace(-0.01, 0.02, 16)).astype(F32).reshape(16, 1)
    folder = scene.path / "ia3"
    write(folder / "adapter_model.safetensors", {name: values})
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    pack(scene, "ia3", "-b", "base", "-p", "density=0.25")
    assert_done(call("decompress", "p.mbz.safetensors", "-o", "u.safetensors", cwd=scene.path))

    after = load_file(scene.path / "u.safetensors")[name].ravel()
    level = np.std((values - 1).astype(np.float64), ddof=1)
    assert np.count_nonzero(after == 1) == 12
    np.testing.assert_allclose(after[-4:], 1 + level, rtol=1e-6)


def test_low_rank_keeps_the_energy_that_was_asked_for(scene: Scene) -> None:
    """Each matrix of a task vector is cut to the least rank of that energy."""
    random = np.random.default_rng(3)
    tau = (random.standard_normal((60, 3)) @ random.standard_normal((3, 50))).astype(F32)
    about = {"kind": "delta", "version": 1, "base": None, "replaced": []}
    write(scene.path / "t.safetensors", {"a.weight": tau}, {"mergebench": json.dumps(about)})

    report = pack(scene, "t.safetensors", "-s", "lowrank", "-p", "energy=0.9999999")

    found: Any = load(scene.path / "p.mbz.safetensors")
    assert isinstance(found["a.weight"], LowRank)
    assert found["a.weight"].rank == 3
    assert report["relative_error"] < 0.005


def test_python_does_the_same(scene: Scene) -> None:
    """The same bytes and numbers as from the command line."""
    report = pack(scene, "lora1", "-p", "density=0.3")
    made = mergebench.compress(
        str(scene.path / "lora1"), scene.path / "q.mbz.safetensors", params={"density": 0.3}
    )

    one, two = (scene.path / f"{name}.mbz.safetensors" for name in "pq")
    assert one.read_bytes() == two.read_bytes()
    assert made.error.relative == report["relative_error"]
    assert made.ratio == report["ratio"]
    mergebench.decompress(str(two), str(scene.path / "u"))
    assert (scene.path / "u" / "adapter_config.json").exists()
