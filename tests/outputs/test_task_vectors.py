"""``--as delta`` and ``--as model``: nothing is lost on the way through a saved task vector."""

from __future__ import annotations

import json

import pytest

from tests.helpers.compare import assert_close
from tests.helpers.files import BF16, F32, listing, metadata, read
from tests.helpers.models import added
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene, build_scene

METHODS = [
    ("-m", "task_arithmetic", "-p", "lam=0.7"),
    ("-m", "ties", "-p", "density=0.4"),
    ("-m", "breadcrumbs"),
]


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
@pytest.mark.parametrize("out", ["tau.safetensors", "tau"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_delta_and_back_is_the_direct_merge(
    scene: Scene, method: tuple[str, ...], out: str, dtype: type
) -> None:
    """A merge saved as a task vector and added to the base gives the bytes of the merge."""
    build_scene(scene.path, dtype)
    models = ("merge", "ft1:0.3", "ft2", "-b", "base", *method)
    assert_done(call(*models, "-o", "direct", cwd=scene.path))
    assert_done(call(*models, "--as", "delta", "-o", out, cwd=scene.path))
    back = ("merge", out, "-b", "base", "-m", "task_arithmetic", "--as", "model", "-o", "back")
    assert_done(call(*back, cwd=scene.path))

    files = [scene.path / name / "model.safetensors" for name in ("direct", "back")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_delta_holds_displacements(scene: Scene) -> None:
    """The saved tensors are fine-tuned minus base in float32, with the base's identity."""
    common = ("-b", "base", "-m", "task_arithmetic", "--as", "delta", "-o", "tau.safetensors")
    assert_done(call("merge", "ft1", *common, cwd=scene.path))

    saved = read(scene.path / "tau.safetensors")
    assert_close(saved, scene.taus[0])
    assert {array.dtype for array in saved.values()} == {F32}
    about = json.loads(metadata(scene.path / "tau.safetensors")["mergebench"])
    shown = assert_done(call("inspect", "base", "--json", cwd=scene.path)).json
    assert about["kind"] == "delta"
    assert about["base"]["fingerprint"] == shown["fingerprint"]


def test_delta_of_a_soup_is_a_displacement(scene: Scene) -> None:
    """The default method too saves what it adds to the base, not the weights themselves."""
    assert_done(
        call(
            "merge",
            "ft1:1",
            "ft2:3",
            "-b",
            "base",
            "--as",
            "delta",
            "-o",
            "tau.safetensors",
            cwd=scene.path,
        )
    )

    one, two = scene.taus
    saved = read(scene.path / "tau.safetensors")
    assert_close(saved, {name: (one[name] + 3 * two[name]) / 4 for name in one}, 2e-6)


def test_delta_of_checkpoints_needs_the_base(scene: Scene) -> None:
    """Without a base there is no displacement to save, whatever the method."""
    before = listing(scene.path)
    for method in ("linear", "ties"):
        ran = call("merge", "ft1", "ft2", "-m", method, "--as", "delta", cwd=scene.path)
        assert_refused(ran, "--base")

    assert listing(scene.path) == before


def test_delta_of_adapters_is_their_product(scene: Scene) -> None:
    """Adapters as a task vector are dense, and exact where a LoRA would be truncated."""
    common = ("-m", "task_arithmetic", "--as", "delta", "-o", "tau.safetensors")
    ran = assert_done(call("merge", "lora1:0.5", "lora2", *common, cwd=scene.path))

    one, two = scene.updates
    assert_close(read(scene.path / "tau.safetensors"), {n: 0.5 * one[n] + two[n] for n in one})
    assert "residual" not in ran.out


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_delta_of_adapters_and_back(scene: Scene, method: tuple[str, ...]) -> None:
    """Adapters merged into a task vector and then into the model: the direct merge."""
    models = ("merge", "lora1", "lora2", *method)
    assert_done(call(*models, "-b", "base", "-o", "direct", cwd=scene.path))
    assert_done(call(*models, "--as", "delta", "-o", "tau.safetensors", cwd=scene.path))
    back = ("tau.safetensors", "-b", "base", "-m", "task_arithmetic", "-o", "back")
    assert_done(call("merge", *back, cwd=scene.path))

    files = [scene.path / name / "model.safetensors" for name in ("direct", "back")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_folder_of_a_task_vector_is_one(scene: Scene) -> None:
    """The folder that --as delta wrote is opened as a task vector, never as a checkpoint."""
    common = ("-b", "base", "-m", "task_arithmetic")
    assert_done(call("merge", "ft1", *common, "--as", "delta", "-o", "tau", cwd=scene.path))
    assert_done(call("merge", "tau", "ft2", *common, "-o", "out", cwd=scene.path))

    assert call("inspect", "tau", "--json", cwd=scene.path).json["kind"] == "task vector"
    one, two = scene.taus
    expected = added(scene.base, {name: one[name] + two[name] for name in one})
    assert_close(read(scene.path / "out"), expected)


def test_as_model_needs_a_base(scene: Scene) -> None:
    """Task vectors alone make no model; with a base that adapters name they do."""
    ran = call("merge", "tau1.safetensors", "tau2.safetensors", "--as", "model", cwd=scene.path)

    assert_refused(ran, "task vectors alone do not make a model", "--base")


def test_adapters_become_a_model_on_the_base_they_name(scene: Scene) -> None:
    """--as model takes the base from adapter_config.json if it lies here, and says so."""
    for name in ("lora1", "lora2"):
        file = scene.path / name / "adapter_config.json"
        named = {**json.loads(file.read_text()), "base_model_name_or_path": "base"}
        file.write_text(json.dumps(named))

    models = ("lora1", "lora2", "-m", "task_arithmetic", "--as", "model", "-o", "out")
    ran = assert_done(call("merge", *models, cwd=scene.path))

    assert ran.err == "note: base taken from what the inputs name: base\n"
    one, two = scene.updates
    expected = added(scene.base, {name: one[name] + two[name] for name in one})
    assert_close(read(scene.path / "out"), expected)
