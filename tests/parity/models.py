"""Small Llama-shaped checkpoints, rebuilt bit for bit from a fixed seed.

One base model and three fine-tunes of it, in float32 or bfloat16, in the layout that
``transformers`` writes: ``config.json``, two safetensors shards and their index. A model has
6 224 parameters, so a float32 copy is about 25 KB.

The recorded outputs in ``recorded/`` are only meaningful for exactly these values, so nothing
here depends on a random stream or a maths library that may change: the noise is a sum of
integers from NumPy's frozen ``RandomState``, which is exact whatever the order of summation.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BASE = "base"
FINE_TUNES = ("ft-a", "ft-b", "ft-c")
NAMES = (BASE, *FINE_TUNES)
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 16, 32, 2, 2, 1, 48
HEAD_DIM = HIDDEN // HEADS
SEED = 20240601
WEIGHT_STD = 0.25  # wide enough that a bfloat16 fine-tune still moves most of its weights
DELTA_STD = 0.05  # of WEIGHT_STD
ZERO_SHARE = 0.1  # share of a fine-tune's entries that are left exactly at the base value

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, by its ``transformers`` name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found[prefix + "input_layernorm.weight"] = (HIDDEN,)
        found[prefix + "self_attn.q_proj.weight"] = (HEADS * HEAD_DIM, HIDDEN)
        found[prefix + "self_attn.k_proj.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        found[prefix + "self_attn.v_proj.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        found[prefix + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        found[prefix + "post_attention_layernorm.weight"] = (HIDDEN,)
        found[prefix + "mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        found[prefix + "mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        found[prefix + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (VOCAB, HIDDEN)
    return found


def _stream(*parts: str) -> np.random.RandomState:
    """Return a random stream that depends on the seed and on ``parts`` only."""
    return np.random.RandomState((SEED + zlib.crc32("/".join(parts).encode())) % 2**32)


def _gaussian(stream: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Return near-normal noise of ``shape`` in float64: twelve uniforms less their mean.

    Each uniform is an integer below 2**32, so the sum is exact and the same on every platform.
    """
    uniforms = stream.randint(0, 2**32, size=(12, *shape), dtype=np.uint64)
    total: np.ndarray = uniforms.sum(axis=0).astype(np.float64)
    return (total - 6.0 * (2**32 - 1)) / 2**32


def tensors(name: str, dtype: str = "float32", layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Return the parameters of model ``name`` (one of ``NAMES``), rounded to ``dtype``.

    A fine-tune is rounded after its delta was added, as a real fine-tune saved in that dtype is.
    """
    if name not in NAMES:
        raise ValueError(f"no model named {name!r}; the models are {', '.join(NAMES)}")
    built: dict[str, np.ndarray] = {}
    for tensor, shape in shapes(layers).items():
        centre = 1.0 if "norm" in tensor else 0.0
        values = centre + WEIGHT_STD * _gaussian(_stream(BASE, tensor), shape)
        # The base is rounded to float32 once, so that a zero delta survives in either dtype.
        values = values.astype(np.float32).astype(np.float64)
        if name != BASE:
            stream = _stream(name, tensor)
            delta = DELTA_STD * WEIGHT_STD * _gaussian(stream, shape)
            delta[stream.randint(0, 1000, size=shape) < 1000 * ZERO_SHARE] = 0.0
            values = values + delta
        built[tensor] = values.astype(np.float32).astype(DTYPES[dtype])
    return built


def digest(parameters: dict[str, np.ndarray]) -> str:
    """Return the SHA-256 of the names and the bytes of ``parameters``, in name order."""
    state = hashlib.sha256()
    for name in sorted(parameters):
        state.update(name.encode() + b"\0" + parameters[name].tobytes())
    return state.hexdigest()


def build(folder: Path, name: str, dtype: str = "float32", layers: int = LAYERS) -> Path:
    """Write model ``name`` in ``dtype`` to ``folder`` / ``name`` and return that path.

    The parameters are split over two shards about half-way, in the order of the network.
    """
    target = Path(folder) / name
    target.mkdir(parents=True, exist_ok=True)
    parameters = tensors(name, dtype, layers)
    total = sum(array.nbytes for array in parameters.values())
    shards: tuple[dict[str, np.ndarray], ...] = ({}, {})
    weight_map: dict[str, str] = {}
    written = 0
    for tensor, array in parameters.items():
        index = int(written >= total / 2)
        shards[index][tensor] = array
        weight_map[tensor] = f"model-{index + 1:05d}-of-00002.safetensors"
        written += array.nbytes
    for index, shard in enumerate(shards):
        path = target / f"model-{index + 1:05d}-of-00002.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
    listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(listing, indent=2) + "\n")
    config = {**CONFIG, "num_hidden_layers": layers, "dtype": dtype}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target
