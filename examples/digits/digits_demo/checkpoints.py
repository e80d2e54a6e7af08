"""Ordinary checkpoint folders: full models, and adapters laid out as PEFT writes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .lora import apply_factors
from .model import DigitViT, ViTConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_METADATA = {"format": "pt"}
_PEFT_PREFIX = "base_model.model."


def save_model(folder: Path, state: Mapping[str, Tensor], config: ViTConfig) -> None:
    """Write ``config.json`` and ``model.safetensors`` (float32, metadata ``format: pt``)."""
    described = {"architectures": [DigitViT.__name__], "model_type": "digit_vit"}
    _write(folder, CONFIG, described | config.to_dict(), WEIGHTS, state)


def load_state(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a full checkpoint folder."""
    return load_file(folder / WEIGHTS)


def load_model(folder: Path) -> DigitViT:
    """Rebuild a model from its folder; every name and shape must match."""
    config = json.loads((folder / CONFIG).read_text())
    sizes = {name: config[name] for name in ViTConfig().to_dict()}
    model = DigitViT(ViTConfig(**sizes))
    model.load_state_dict(load_state(folder))
    return model


def save_adapter(
    folder: Path,
    lora: Mapping[str, Tensor],
    rank: int,
    alpha: int,
    targets: Iterable[str],
    base: str,
) -> None:
    """Write ``<module>.lora_A.weight`` and ``lora_B`` factors the way PEFT does."""
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(targets),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    state = {_PEFT_PREFIX + name: tensor for name, tensor in lora.items()}
    _write(folder, ADAPTER_CONFIG, config, ADAPTER_WEIGHTS, state)


def load_adapter(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Read the factors of an adapter folder, and its scaling ``lora_alpha / r``."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    stored = load_file(folder / ADAPTER_WEIGHTS)
    lora = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in stored.items()}
    return lora, config["lora_alpha"] / config["r"]


def load_expert(folder: Path, base: Path) -> DigitViT:
    """Rebuild an expert, full or adapter; ``base`` is the folder of the pretrained model."""
    if not (folder / ADAPTER_CONFIG).exists():
        return load_model(folder)
    model = load_model(base)
    lora, scaling = load_adapter(folder)
    model.load_state_dict(apply_factors(model.state_dict(), lora, scaling))
    return model


def _write(
    folder: Path,
    config_name: str,
    config: Mapping[str, Any],
    weights_name: str,
    state: Mapping[str, Tensor],
) -> None:
    """Fill a temporary folder and rename it, so that an existing folder is a complete one."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / config_name).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(tensors, partial / weights_name, metadata=_METADATA)
    partial.rename(folder)
