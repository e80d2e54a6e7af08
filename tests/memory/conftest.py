"""About 2 GB of models on disk, written in blocks and taken away afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

#: The first is larger than the whole memory that the merges may use.
SHAPES = {
    "model.embed_tokens.weight": (36_000, 4096),
    **{f"model.layers.{n}.mlp.up_proj.weight": (8192, 4096) for n in range(6)},
}
_BLOCK = 1 << 23


def write_model(path: Path, seed: int) -> None:
    """Random bfloat16 weights between 0.5 and 2, of both signs."""
    header = {}
    position = 0
    for name, (rows, columns) in SHAPES.items():
        size = 2 * rows * columns
        header[name] = {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, position, 2 * _BLOCK):
            count = min(_BLOCK, (position - start) // 2)
            bits = np.frombuffer(random.bytes(2 * count), np.uint16)
            # Sign, lowest exponent bit and mantissa are random.
            file.write(((bits & 0x80FF) | 0x3F00).tobytes())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base and two fine-tunes, 2 GB in all."""
    folder = tmp_path_factory.mktemp("models")
    try:
        for seed, name in enumerate(("base", "ft1", "ft2")):
            write_model(folder / f"{name}.safetensors", seed)
        yield folder
    finally:
        shutil.rmtree(folder)
