"""Synthetic checkpoints of any size: a base and fine-tunes with Gaussian deltas, in bf16."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from mergebench.checkpoints.placement import TensorSpec, plan_layout
from mergebench.checkpoints.writer import Output

_BLOCK = 1 << 20


def specs(size: int, width: int = 2048) -> list[TensorSpec]:
    """Tensors of a decoder of about ``size`` bytes in bf16: square, wide and one-dimensional."""
    block = [
        ("attn.qkv.weight", (3 * width, width)),
        ("attn.out.weight", (width, width)),
        ("mlp.up.weight", (4 * width, width)),
        ("mlp.down.weight", (width, 4 * width)),
        ("norm.weight", (width,)),
    ]
    per_block = sum(2 * int(np.prod(shape)) for _, shape in block)
    count = max(round((size - 2 * 8192 * width) / per_block), 1)
    found = [TensorSpec("embed.weight", "BF16", (8192, width))]
    for layer in range(count):
        found += [TensorSpec(f"layers.{layer}.{name}", "BF16", shape) for name, shape in block]
    return found


def make(folder: Path, size: int, models: int) -> tuple[Path, list[Path]]:
    """Write ``base.safetensors`` and ``ft0…`` of about ``size`` bytes each, once.

    Weights have σ = 0.02; the deltas' σ falls from 2e-3 to 5e-4 over the models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout = plan_layout(specs(size))
    paths = [folder / "base.safetensors", *(folder / f"ft{i}.safetensors" for i in range(models))]
    missing = [path for path in paths if not path.exists()]
    if missing:
        for index, path in enumerate(paths):
            if path in missing:
                _write(path, layout, index)
    return paths[0], paths[1:]


def _write(path: Path, layout: object, model: int) -> None:
    with Output(path, layout, single_file=True) as output:  # type: ignore[arg-type]
        for number, place in enumerate(layout.places.values()):  # type: ignore[attr-defined]
            entries = int(np.prod(place.spec.shape))
            for block, start in enumerate(range(0, entries, _BLOCK)):
                count = min(_BLOCK, entries - start)
                own = np.random.default_rng((number, block))
                values = own.standard_normal(count, dtype=np.float32) * 0.02
                values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
                if model:
                    tuned = np.random.default_rng((number, block, model))
                    sigma = 2e-3 / (1 + model)
                    values += tuned.standard_normal(count, dtype=np.float32) * sigma
                output.write(place.spec.name, 2 * start, values.astype(ml_dtypes.bfloat16))
