"""How far a merge is from its base, and what each input has to do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.core.errors import MismatchError
from mergebench.merge.drift import Drift, Layer, drift
from mergebench.sources import Source
from mergebench.sources.opening import open_source, with_base
from tests.helpers.files import F32, F64, Array, read, write
from tests.helpers.models import save_folder
from tests.helpers.running import assert_done, call
from tests.helpers.scene import Scene, build_scene

LAYERS = {
    "model.layers.0": "model.layers.0.",
    "model.layers.1": "model.layers.1.",
    "embedding": "model.embed_tokens.",
    "head": "lm_head.",
    "norm": "model.norm.",
}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Checkpoints and adapters."""
    return build_scene(tmp_path)


def opened(scene: Scene, *names: str) -> list[Source]:
    """Inputs that know the base."""
    base = open_source(str(scene.path / "base"), ReadOptions())
    assert base.checkpoint is not None
    options = with_base(ReadOptions(), base.checkpoint)
    return [open_source(str(scene.path / name), options) for name in names]


def flat(arrays: dict[str, Array], prefix: str) -> Array:
    """All floating entries below a prefix, in float64."""
    parts = [
        array.astype(F64).reshape(-1)
        for name, array in sorted(arrays.items())
        if name.startswith(prefix) and array.dtype.kind not in "iub"
    ]
    return np.concatenate(parts)


def assert_layer(layer: Layer, base: Array, merged: Array, taus: list[Array]) -> None:
    """Equal to what whole float64 vectors give."""
    tau = merged - base
    norm = np.linalg.norm(tau)
    assert layer.entries == base.size
    assert layer.norm == pytest.approx(norm, rel=1e-9)
    assert layer.drift == pytest.approx(norm / np.linalg.norm(base), rel=1e-9)
    found = np.linalg.lstsq(np.stack(taus, axis=1), tau, rcond=None)[0]
    for part, one, factor in zip(layer.parts, taus, found, strict=True):
        assert part.cosine == pytest.approx(one @ tau / np.linalg.norm(one) / norm, rel=1e-6)
        assert part.coefficient == pytest.approx(factor, rel=1e-6)
        assert part.share == pytest.approx(factor * (one @ tau) / norm**2, rel=1e-6)
    rest = tau - np.stack(taus, axis=1) @ found
    assert layer.unexplained == pytest.approx((rest @ rest) / norm**2, abs=1e-7)


@pytest.mark.parametrize("method", [("ties", "-p", "density=0.4"), ("breadcrumbs",), ("linear",)])
@pytest.mark.parametrize("workers", [1, 3])
def test_against_whole_vectors(scene: Scene, method: tuple[str, ...], workers: int) -> None:
    """Norms, cosines, coefficients and shares of every block and class, and of all."""
    command = ("merge", "ft1", "ft2", "-b", "base", "-m", *method, "-o", "out")
    assert_done(call(*command, cwd=scene.path))

    merged, base, *inputs = opened(scene, "out", "base", "ft1", "ft2")
    steps: list[tuple[str, int, int]] = []
    found = drift(merged, base, inputs, workers=workers, progress=lambda *step: steps.append(step))

    assert [each.where for each in found.layers] == list(LAYERS)
    assert found.notes == ()
    values = read(scene.path / "out")
    for layer, prefix in zip((*found.layers, found.total), (*LAYERS.values(), ""), strict=True):
        one, two = (flat(each, prefix) for each in (scene.base, values))
        taus = [flat(each, prefix) - one for each in scene.tuned]
        assert_layer(layer, one, two, taus)
    assert steps[-1][1] == steps[-1][2] == found.total.entries


def test_linear_merges_are_explained_by_their_weights(scene: Scene) -> None:
    """The coefficient is the weight, the shares sum up to 1, also below zero."""
    command = ("merge", "ft1:0.7", "ft2:-0.2", "-b", "base", "-m", "task_arithmetic", "-o", "out")
    assert_done(call(*command, cwd=scene.path))

    merged, base, *inputs = opened(scene, "out", "base", "ft1", "ft2")
    found = drift(merged, base, inputs)

    for layer in (*found.layers, found.total):
        assert [each.coefficient for each in layer.parts] == pytest.approx([0.7, -0.2], rel=1e-4)
        assert sum(each.share for each in layer.parts) == pytest.approx(1, abs=1e-6)
    assert found.total.parts[1].cosine < 0


def test_equal_inputs_share_alike(scene: Scene) -> None:
    """A fit that is not unique takes the smallest coefficients; an input of zeros has none."""
    base, one = opened(scene, "base", "ft1")

    found = drift(one, base, [one, one, base])

    assert [each.coefficient for each in found.total.parts] == pytest.approx([0.5, 0.5, 0])
    assert [each.share for each in found.total.parts] == pytest.approx([0.5, 0.5, 0])
    assert np.isnan(found.total.parts[2].cosine)
    still = drift(base, base, [one]).total
    assert (still.drift, still.norm, still.parts[0].coefficient) == (0, 0, 0)
    assert np.isnan(still.parts[0].cosine)
    assert still.to_json()["inputs"][0] == {"cosine": None, "coefficient": 0.0, "share": None}


def test_adapters_without_a_base(scene: Scene) -> None:
    """Norms in place of relative changes."""
    command = ("merge", "lora1:0.5", "lora2:2", "-m", "task_arithmetic", "-o", "out")
    assert_done(call(*command, cwd=scene.path))
    merged, *inputs = (
        open_source(str(scene.path / name), ReadOptions()) for name in ("out", "lora1", "lora2")
    )

    found = drift(merged, None, inputs)

    one, two = (np.concatenate([each.reshape(-1) for each in up.values()]) for up in scene.updates)
    assert found.total.norm == pytest.approx(np.linalg.norm(0.5 * one + 2 * two), rel=1e-6)
    assert np.isnan(found.total.drift)
    assert [each.coefficient for each in found.total.parts] == pytest.approx([0.5, 2], rel=1e-5)


@pytest.mark.parametrize("pair", ["base+lora2", "moved+lora2"])
def test_adapters_as_inputs_of_a_model(scene: Scene, pair: str) -> None:
    """Alone, or on the base, or on a copy of it."""
    save_folder(scene.path / "moved", scene.base)
    command = ("merge", "lora1:0.5", "base+lora2:2", "-b", "base", "-m", "task_arithmetic")
    assert_done(call(*command, "-o", "out", cwd=scene.path))
    merged, base, one = opened(scene, "out", "base", "lora1")
    left, right = pair.split("+")
    two = open_source(f"{scene.path / left}+{scene.path / right}", ReadOptions())

    found = drift(merged, base, [one, two])

    moved = next(each for each in found.layers if each.where == "model.layers.0")
    assert [each.coefficient for each in moved.parts] == pytest.approx([0.5, 2], rel=1e-5)
    assert moved.unexplained == pytest.approx(0, abs=1e-6)


def test_tensors_that_cannot_be_compared_are_noted(scene: Scene) -> None:
    """Of other shapes, or in one model only."""
    arrays = dict(scene.tuned[0])
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:7]
    arrays["extra.weight"] = np.ones(3, F32)
    write(scene.path / "other.safetensors", arrays)
    arrays = dict(scene.tuned[0])
    del arrays["model.norm.weight"]
    write(scene.path / "less.safetensors", arrays)

    base, merged, less = opened(scene, "base", "other.safetensors", "less.safetensors")
    found = drift(merged, base, [less])

    assert found.notes == (
        "2 tensors are not in the base, or of another shape there",
        f"{less.label} lacks 1 tensors, which count as unchanged",
    )
    assert "head" not in [each.where for each in found.layers]


def test_models_need_a_base(scene: Scene) -> None:
    """There is nothing else to measure from."""
    (merged,) = opened(scene, "ft1")

    with pytest.raises(MismatchError, match="add --base"):
        drift(merged, None)


def test_table_and_json(scene: Scene) -> None:
    """Both show the same numbers; the toy model is of no library, which the last line says."""
    merge = ("merge", "ft1", "ft2", "-b", "base", "-m", "ties", "-o", "out")
    assert_done(call(*merge, cwd=scene.path))

    shown = call("check", "out", cwd=scene.path)
    data: dict[str, Any] = call("check", "out", "--json", cwd=scene.path).json
    named = call("check", "out", "ft1", "--base", "base", "--json", cwd=scene.path).json
    bare = call("check", "ft1", cwd=scene.path)

    assert shown.code == 2
    assert "ToyForCausalLM" in shown.err
    head, *lines = shown.out.splitlines()
    assert head.split()[:2] == ["where", "drift"]
    rows = [*data["drift"]["layers"], data["drift"]["total"]]
    for line, row in zip(lines, rows, strict=True):
        words = line.split()
        assert words[0] == row["where"]
        assert float(words[1]) == pytest.approx(row["drift"], rel=0.01)
        cosines = [f"{each['cosine']:.3f}" for each in row["inputs"]]
        assert [word for word in words if word.startswith("0.")][1:] == cosines
        assert words[-1] == f"{row['unexplained']:.0%}"
    assert max(line.count("█") for line in lines) == 16
    assert data["loading"] is None
    assert named["drift"]["inputs"] == ["ft1"]
    assert bare.out == ""
    assert "drift is not measured without a base: give --base" in bare.err
    assert Drift((), (), Layer("all", 0, 0, 0.0, 0.0, ())).to_json()["total"]["inputs"] == []
