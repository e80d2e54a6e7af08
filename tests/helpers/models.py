"""Small models, fine-tunes and their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.files import F32, Array, write

#: Files that stand beside the weights of a model, with contents that are easy to recognise.
COMPANIONS = {
    "generation_config.json": b'{"max_length": 7}\n',
    "tokenizer.json": b'{"version": "1.0",  "model": {}}',
    "tokenizer_config.json": '{"unk_token": "⁇"}'.encode(),
    "special_tokens_map.json": b"{}",
    "vocab.txt": b"a\r\nb\r\n",
    "chat_template.jinja": b"{{ messages }}",
}
CONFIG: dict[str, Any] = {"architectures": ["ToyForCausalLM"], "model_type": "toy"}
_SHAPES = {
    "model.embed_tokens.weight": (32, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.up_proj.bias": (24,),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.up_proj.weight": (24, 16),
    "model.layers.1.mlp.up_proj.bias": (24,),
    "model.norm.weight": (16,),
    "lm_head.weight": (32, 16),
}
#: Of a small model's tensors, the matrices that adapters change.
TARGETS = tuple(name.removesuffix(".weight") for name in _SHAPES if "_proj.weight" in name)


def base_model(seed: int = 0, dtype: Any = F32) -> dict[str, Array]:
    """Random weights of a small language model with one integer buffer."""
    random = np.random.default_rng(seed)
    model = {
        name: random.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in _SHAPES.items()
    }
    return model | {"model.position_ids": np.arange(8, dtype=np.int64)}


def fine_tune(base: Mapping[str, Array], seed: int, size: float = 0.1) -> dict[str, Array]:
    """The base with noise on every floating tensor, in its dtypes."""
    random = np.random.default_rng(1000 + seed)
    tuned = {}
    for name, array in base.items():
        tuned[name] = array
        if array.dtype.kind not in "iub":
            noise = size * random.standard_normal(array.shape)
            tuned[name] = (array.astype(np.float64) + noise).astype(array.dtype)
    return tuned


def save_folder(
    folder: Path,
    arrays: Mapping[str, Array],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    companions: Mapping[str, bytes] | None = None,
) -> Path:
    """A model folder: config, companions, and one weights file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}, indent=3))
    for name, content in (companions or {}).items():
        (folder / name).write_bytes(content)
    if shards == 1:
        write(folder / "model.safetensors", arrays, {"format": "pt"})
        return folder
    names = list(arrays)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: arrays[name] for name in names[number::shards]}
        write(folder / file, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def task_vector(tuned: Mapping[str, Array], base: Mapping[str, Array]) -> dict[str, Array]:
    """Fine-tuned minus base in float64, floating tensors only."""
    return {
        name: array.astype(np.float64) - base[name].astype(np.float64)
        for name, array in tuned.items()
        if array.dtype.kind not in "iub"
    }


def added(base: Mapping[str, Array], deltas: Mapping[str, Any]) -> dict[str, Array]:
    """The base with displacements on top, in float64; integer tensors as they are."""
    return {
        name: array.astype(np.float64) + deltas[name] if name in deltas else array
        for name, array in base.items()
    }
