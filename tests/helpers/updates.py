"""What a LoRA does to the weights, computed from its files alone."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

from tests.helpers.files import F64, Array, metadata, read


def update_of(place: Path) -> dict[str, Array]:
    """ΔW of a LoRA of linear layers in PEFT's names, in float64; a folder or a file."""
    if place.is_dir():
        config = json.loads((place / "adapter_config.json").read_text())
        tensors = read(place / "adapter_model.safetensors")
    else:
        config = json.loads(metadata(place)["mergebench_adapter_config"])
        tensors = read(place)
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = tensors[key.replace("lora_A", "lora_B")]
            found[f"{module}.weight"] = _scale(config) * (B.astype(F64) @ A.astype(F64))
    return found


def _scale(config: dict[str, Any]) -> float:
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (sqrt(rank) if config["use_rslora"] else rank)


def kohya_update_of(path: Path) -> dict[str, Array]:
    """ΔW of a Kohya file by flattened module name, in float64."""
    tensors = read(path)
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_down.weight"):
            module = key.removesuffix(".lora_down.weight")
            B = tensors[f"{module}.lora_up.weight"]
            scale = float(tensors[f"{module}.alpha"]) / A.shape[0]
            found[module] = scale * (B.astype(F64) @ A.astype(F64))
    return found
