"""SLERP and its kin through the command line: t by part of the model, adapters and named bases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from mergebench import merge_models
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.running import assert_done, call
from tests.helpers.scene import Scene
from tests.oracle import geometric as oracle


def test_t_may_differ_between_parts(scene: Scene) -> None:
    """Weights by selector are a t for each part: embeddings stay with ft1, the rest is halfway."""
    part = "class=embedding:weight=1/0"
    options = ("-m", "slerp", "--where", part, "-o", "out.safetensors")
    assert_done(call("merge", "ft1.safetensors", "ft2.safetensors", *options, cwd=scene.path))

    got = load_file(scene.path / "out.safetensors")
    models = {name: [model[name] for model in scene.tuned] for name in scene.base}
    expected = oracle.each_tensor(models, lambda x: oracle.slerp(x, (0.5, 0.5)))
    alone = [name for name in models if "embed" in name or "wte" in name]
    assert alone
    assert_close(got, {**expected, **{name: models[name][0] for name in alone}})


def named(scene: Scene, folder: str) -> Path:
    """A LoRA folder whose config names the base by its place."""
    path = scene.path / folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = str(scene.path / "base")
    path.write_text(json.dumps(config))
    return path.parent


def test_adapters_are_task_vectors_whoever_names_the_base(scene: Scene) -> None:
    """NuSLERP of two LoRAs works on ΔW with --base, with a base they name, and without any."""
    adapters = [named(scene, folder) for folder in ("lora1", "lora2")]
    base = scene.path / "base"
    given = merge_models(adapters, base=base, method="nuslerp")
    assert_same(merge_models(adapters, form="model", method="nuslerp"), given)

    deltas = {name: [each[name] for each in scene.updates] for name in scene.updates[0]}
    expected = oracle.each_tensor(deltas, lambda x: oracle.slerp(x, (0.5, 0.5)))
    alone = merge_models(adapters, method="nuslerp", form="delta")
    assert_close({name: alone[name] for name in expected}, expected, 1e-5)
    for name, delta in expected.items():
        assert np.allclose(given[name] - scene.base[name], delta, atol=1e-6)
