"""The order of adapted modules in a model, for families that number them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergebench.adapters_zoo.peft_bridge import Layer
from mergebench.core.errors import FormatError
from mergebench.core.tensor import Tensor, read_all

_MOST = 4096


def in_order(
    label: str,
    suffix: str,
    layers: Sequence[Layer],
    shared: Mapping[str, Tensor],
    entries: Mapping[str, Any],
) -> list[Layer]:
    """The layers in the order of the model, which the names in a file do not tell.

    Parameters
    ----------
    label, suffix : str
        The adapter, and the tensors that settle the order or make it unimportant.
    layers : sequence of Layer
    shared : mapping of suffix to Tensor
    entries : mapping
        Config entries, looked at.

    Raises
    ------
    FormatError
        If the order matters and cannot be known.
    """
    stored = all(suffix in layer.tensors for layer in layers)
    if len(layers) == 1 or (stored and suffix != "tinylora_P"):
        return list(layers)
    vectors = [name for name in shared if name.startswith("tinylora_v.")]
    if len(vectors) == 1 and stored:
        return list(layers)
    if not stored or len(layers) > _MOST:
        raise FormatError(
            f"{label}: the numbers that are drawn for a module depend on its place in the model, "
            "which the file does not tell",
            fix=f"save the adapter with its {suffix} (save_indices or save_projection)",
        )
    return _by_projection(label, layers, int(entries.get("projection_seed", 42)))


def _by_projection(label: str, layers: Sequence[Layer], seed: int) -> list[Layer]:
    """Stored projections are those of seed + place: try every place."""
    import torch

    waiting = {
        layer.name: (layer, read_all(layer.tensors["tinylora_P"]).astype(np.float32))
        for layer in layers
    }
    ordered = []
    for place in range(len(layers)):
        for name, (layer, stored) in waiting.items():
            if stored.ndim != 3:
                continue
            generator = torch.Generator().manual_seed(seed + place)
            scale = 1.0 / stored.shape[-1] ** 0.5
            drawn = torch.normal(0.0, scale, stored.shape, generator=generator).numpy()
            # Stored with fewer digits, or drawn by another version.
            if np.allclose(drawn, stored, rtol=1e-2, atol=1e-3):
                ordered.append(layer)
                del waiting[name]
                break
        else:
            raise FormatError(
                f"{label}: the projections in the file are not those of its seed, so the place of "
                "its modules in the model is not known",
                got=f"none for place {place}",
            )
    return ordered
