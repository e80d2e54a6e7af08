"""Small LoRA adapters in PEFT's and Kohya's formats, and task vectors as saved files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.files import F32, Array, write
from tests.helpers.models import TARGETS, base_model

Factors = dict[str, tuple[Array, Array]]


def factors(
    seed: int, rank: int = 4, modules: Sequence[str] = TARGETS, dtype: Any = F32
) -> Factors:
    """Random ``(B, A)`` for modules of the small model."""
    random = np.random.default_rng(2000 + seed)
    shapes = {name: base_model()[f"{name}.weight"].shape for name in modules}
    return {
        name: (
            random.standard_normal((rows, rank), np.float32).astype(dtype),
            (0.1 * random.standard_normal((rank, columns), np.float32)).astype(dtype),
        )
        for name, (rows, columns) in shapes.items()
    }


def product(made: Factors, scale: float) -> dict[str, Array]:
    """``scale · B A`` of every module in float64, under the names of the displaced weights."""
    return {
        f"{name}.weight": scale * (B.astype(np.float64) @ A.astype(np.float64))
        for name, (B, A) in made.items()
    }


def peft_tensors(made: Factors) -> dict[str, Array]:
    """The factors under PEFT's names."""
    tensors = {}
    for name, (B, A) in made.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    return tensors


def save_peft(
    folder: Path,
    made: Factors,
    alpha: float = 8.0,
    extra: Mapping[str, Array] | None = None,
    **config: Any,
) -> Path:
    """A PEFT folder; ``extra`` holds modules saved in full, under their names in the base."""
    rank = max(A.shape[0] for _, A in made.values())
    replaced = {f"base_model.model.{name}": array for name, array in (extra or {}).items()}
    write(folder / "adapter_model.safetensors", {**peft_tensors(made), **replaced})
    modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in extra or {}})
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in made}),
        "modules_to_save": modules or None,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def save_kohya(path: Path, made: Factors, alpha: float = 2.0, prefix: str = "lora_unet") -> Path:
    """A Kohya file: flattened names, ``lora_up``, ``lora_down`` and ``alpha``."""
    tensors = {}
    for name, (B, A) in made.items():
        module = f"{prefix}_{name.replace('.', '_')}"
        tensors[f"{module}.lora_down.weight"] = A
        tensors[f"{module}.lora_up.weight"] = B
        tensors[f"{module}.alpha"] = np.array(alpha, np.float32)
    return write(path, tensors)


def save_bare(path: Path, made: Factors, alpha: float = 8.0) -> Path:
    """A single file in PEFT's names that states its rank and alpha in the metadata."""
    rank = next(iter(made.values()))[1].shape[0]
    return write(path, peft_tensors(made), {"lora_alpha": str(alpha), "rank": str(rank)})


def save_delta(path: Path, deltas: Mapping[str, Array]) -> Path:
    """A saved task vector."""
    about = {"kind": "delta", "version": 1, "base": None, "replaced": []}
    return write(path, deltas, {"format": "pt", "mergebench": json.dumps(about)})
