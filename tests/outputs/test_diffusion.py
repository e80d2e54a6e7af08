"""LoRAs merged into checkpoints of diffusion models, in the layout that the checkpoint has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.adapters.diffusion import converted, fused, kohya, model
from tests.adapters.test_layouts import ADAPTED, NETS, assert_weights, both, flat, rooted, shapes
from tests.helpers.files import read, write
from tests.helpers.running import assert_done, assert_refused, call


def lora(name: str, seed: int) -> dict[str, np.ndarray]:
    """A LoRA in Kohya's names, those of diffusers' modules for SD 1.5."""
    _, original = both(name)
    pairs = ADAPTED[name]
    named = {flat(two): two for two in pairs.values()}
    stored = kohya(shapes(original, named), seed)
    if name != "sd15":
        return stored
    ours = {flat(two): flat(one) for one, two in pairs.items()}
    return {ours[key.partition(".")[0]] + key[key.index(".") :]: v for key, v in stored.items()}


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("name", NETS)
def test_merged_into_a_checkpoint(name: str, layout: str, tmp_path: Path) -> None:
    """The sum of two LoRAs on a single file and on diffusers' folder: one result, as diffusers'."""
    own, original = both(name)
    if layout == "file":
        base = write(tmp_path / "base.safetensors", rooted(name, original))
    else:
        base = tmp_path / ("transformer" if name == "flux" else "unet")
        model(name).save_pretrained(base)
    loras = [lora(name, seed) for seed in (1, 2)]
    for index, stored in enumerate(loras):
        write(tmp_path / f"lora{index}.safetensors", stored)
    out = "merged.safetensors" if layout == "file" else "merged"
    assert_done(
        call("merge", "lora0.safetensors", "lora1.safetensors:0.5", "--base", base, "-m",
             "task_arithmetic", "-o", out, cwd=tmp_path)
    )  # fmt: skip
    got = read(tmp_path / out)
    if layout == "file":
        got = converted(name, got)
    one, two = (fused(name, stored) for stored in loras)
    assert_weights(got, {key: one[key] + 0.5 * (two[key] - own[key]) for key in own})


def test_part_of_an_adapter(tmp_path: Path) -> None:
    """An adapter for all of a pipeline is merged into one model of it when that is asked for."""
    stored = lora("sd15", 1) | kohya({"lora_te_text_model_encoder_layers_0_mlp_fc1": (12, 8)})
    write(tmp_path / "lora.safetensors", stored)
    model("sd15").save_pretrained(tmp_path / "unet")
    line = ("merge", "lora.safetensors", "--base", "unet", "-m", "task_arithmetic", "-o", "out")
    assert_refused(call(*line, cwd=tmp_path), "lora_te_text_model", "--part")
    assert_done(call(*line, "--part", "unet", cwd=tmp_path))
    assert_done(call("verify", "out", cwd=tmp_path))

    assert_weights(read(tmp_path / "out"), fused("sd15", lora("sd15", 1)))
    assert "part: unet" in (tmp_path / "out" / "mergebench_recipe.yaml").read_text()
    again = call("run", "out/mergebench_recipe.yaml", "-o", "again", cwd=tmp_path)
    assert_done(again)
    assert_weights(read(tmp_path / "again"), read(tmp_path / "out"))
