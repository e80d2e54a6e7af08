"""Every choice of the experiment, and the key under which a trained model is cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
TEMPLATE = "This text is about {label}."
# A change in any of these files changes the trained weights, so it must miss the cache.
_TRAINING_SOURCES = ("encoder.py", "train.py")


@dataclass(frozen=True)
class TrainSettings:
    """How one expert is trained: AdamW, warmed up over a tenth of the steps, then linear decay."""

    lr: float
    epochs: int = 4
    batch_size: int = 32
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Settings:
    """The whole experiment.

    ``max_length`` tokens of a text are read; logits are ``scale`` times a cosine. ``template``
    describes a label. ``limit`` is the most texts of a split, 0 for all of them. AdaMerging
    takes ``steps``, and aTLAS ``epochs`` passes over the validation split. ``threads`` is torch's.
    """

    seed: int = 0
    max_length: int = 64
    scale: float = 30.0
    template: str = TEMPLATE
    limit: int = 1500
    rank: int = 16
    full: TrainSettings = TrainSettings(lr=2e-4)
    lora: TrainSettings = TrainSettings(lr=1e-3)
    steps: int = 200
    epochs: int = 10
    memory: str = "6GiB"
    threads: int = 2
    device: str = "cpu"
    few: bool = False


def _quick(settings: Settings) -> Settings:
    """Return a version that shows in a minute that everything runs."""
    return replace(
        settings,
        limit=min(settings.limit or 60, 60),
        rank=4,
        full=replace(settings.full, epochs=1),
        lora=replace(settings.lora, epochs=1),
        steps=5,
        threads=1,
        few=True,
    )


def chosen(
    *,
    quick: bool,
    epochs: int | None = None,
    rank: int | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    **given: Any,
) -> Settings:
    """Return the defaults, or those of a quick run, with what is given in their place."""
    settings = Settings(**given)
    settings = _quick(settings) if quick else settings
    named = {"rank": rank, "limit": limit, "max_length": max_length}
    settings = replace(settings, **{k: v for k, v in named.items() if v is not None})
    if epochs is None:
        return settings
    full, lora = (replace(each, epochs=epochs) for each in (settings.full, settings.lora))
    return replace(settings, full=full, lora=lora)


def cache_key(ingredients: Mapping[str, Any]) -> str:
    """Hash JSON-ready ``ingredients`` and the training code to 12 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode())
    for name in _TRAINING_SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:12]
