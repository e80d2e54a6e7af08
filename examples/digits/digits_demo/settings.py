"""Every choice of the experiment, and the key under which a trained model is cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .model import ViTConfig

# A change in any of these files changes the trained weights, so it must miss the cache.
_TRAINING_SOURCES = ("data.py", "lora.py", "model.py", "train.py")


@dataclass(frozen=True)
class TrainSettings:
    """How one model is trained: AdamW under a one-cycle schedule that peaks at ``lr``.

    ``shift`` moves half of the images by up to one pixel in each direction.
    """

    epochs: int
    lr: float
    batch_size: int = 32
    weight_decay: float = 0.0
    label_smoothing: float = 0.2
    shift: bool = False


@dataclass(frozen=True)
class Settings:
    """The whole experiment. λ grids are kept as text: a merge writes one folder per text."""

    seeds: tuple[int, ...] = (0, 1, 2)
    ranks: tuple[int, ...] = (1, 4, 16)
    lora_alpha_per_rank: int = 2
    lora_targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")
    vit: ViTConfig = field(default_factory=ViTConfig)
    pretrain: TrainSettings = TrainSettings(epochs=40, lr=4e-3, weight_decay=0.05, shift=True)
    full: TrainSettings = TrainSettings(epochs=5, lr=2e-3)
    lora: TrainSettings = TrainSettings(epochs=5, lr=7e-3)
    sum_grid: tuple[str, ...] = tuple(f"{step / 10:g}" for step in range(1, 11))
    ties_grid: tuple[str, ...] = tuple(f"{step / 5:g}" for step in range(1, 9))
    # For methods that average, or whose λ the papers choose above one.
    mean_grid: tuple[str, ...] = ("0.25", "0.5", "0.75", "1", "1.5", "2", "3")
    every: bool = False


def quick(settings: Settings) -> Settings:
    """Return a version that runs every step in seconds: one seed, one rank, few epochs."""
    return replace(
        settings,
        seeds=settings.seeds[:1],
        ranks=(4,),
        pretrain=replace(settings.pretrain, epochs=6),
        full=replace(settings.full, epochs=2),
        lora=replace(settings.lora, epochs=2),
        sum_grid=("0.2", "0.4"),
        ties_grid=("0.4", "0.8"),
        mean_grid=("1", "2"),
    )


def cache_key(ingredients: Mapping[str, Any]) -> str:
    """Hash JSON-ready ``ingredients`` and the training code to 12 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode())
    for name in _TRAINING_SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:12]


def base_key(settings: Settings, seed: int) -> str:
    """Return the cache key of the pretrained model of ``seed``."""
    return cache_key(
        {"seed": seed, "vit": asdict(settings.vit), "pretrain": asdict(settings.pretrain)}
    )


def expert_key(settings: Settings, seed: int, domain: str, rank: int | None) -> str:
    """Return the cache key of one expert; ``rank`` None is a full fine-tune."""
    ingredients: dict[str, Any] = {"base": base_key(settings, seed), "domain": domain}
    if rank is None:
        ingredients["train"] = asdict(settings.full)
    else:
        ingredients["train"] = asdict(settings.lora)
        ingredients["rank"] = rank
        ingredients["alpha"] = settings.lora_alpha_per_rank * rank
        ingredients["targets"] = settings.lora_targets
    return cache_key(ingredients)
