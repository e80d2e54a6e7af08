"""Small outputs, and damage done to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np

from mergebench import merge_models
from mergebench.merge.verify import Verdict, verify
from tests.helpers.files import BF16, Array, header, write

SHAPES = {"layers.0.q.weight": (6, 4), "layers.1.q.weight": (6, 4), "norm.weight": (4,)}


def build_inputs(folder: Path) -> dict[str, Array]:
    """A base and two fine-tunes as folders, with config and tokenizer; the base's tensors."""
    random = np.random.default_rng(7)
    base: dict[str, Array] = {
        name: random.standard_normal(shape).astype(BF16) for name, shape in SHAPES.items()
    }
    base["steps"] = np.arange(3)
    for name in ("base", "ft1", "ft2"):
        arrays = dict(base)
        if name != "base":
            for key in SHAPES:
                noise = random.standard_normal(base[key].shape)
                arrays[key] = (base[key] + noise).astype(BF16)
        write(folder / name / "model.safetensors", arrays, {"format": "pt"})
        (folder / name / "config.json").write_text('{"model_type": "toy"}')
        (folder / name / "tokenizer.json").write_text('{"version": "1.0"}')
    return base


def merged(folder: Path, out: str, **options: Any) -> Path:
    """A TIES merge of the inputs in a folder, which are recorded by relative paths."""
    chosen = {"base": "base", "method": "ties", "density": 0.5, **options}
    with chdir(folder):
        merge_models(["ft1", "ft2"], out=out, **chosen)
    return folder / out


def checked(place: Path, **options: Any) -> Verdict:
    """The verdict on an output beside its inputs."""
    return verify(place, **{"inputs": place.parent, "workers": 1, **options})


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Turn one bit of a file over; twice is nothing."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def places_of(path: Path) -> dict[str, tuple[int, int]]:
    """First and last byte of every tensor of a file, read without mergebench."""
    entries, start = header(path)
    entries.pop("__metadata__", None)
    return {
        name: (start + each["data_offsets"][0], start + each["data_offsets"][1])
        for name, each in entries.items()
    }


def edit(path: Path, change: Mapping[str, Any]) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(change)))
