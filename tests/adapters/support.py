"""Adapters opened without the checkpoints room, and comparisons in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors import safe_open

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions, read_adapter
from mergebench.core.delta import Delta, Replacement, tile
from mergebench.core.tensor import Array, ArrayTensor, read_all

F64 = np.dtype(np.float64)


def to_numpy(tensor: torch.Tensor) -> Array:
    """A torch tensor as an array of the same dtype, bfloat16 included."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def source_of(
    arrays: Mapping[str, Array],
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> AdapterSource:
    """An adapter held in memory."""
    tensors = {name: ArrayTensor(array) for name, array in arrays.items()}
    return AdapterSource("toy", tensors, config, metadata or {})


def load_folder(folder: Path) -> AdapterSource:
    """An adapter that PEFT saved."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        arrays = {key: to_numpy(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    config = json.loads((folder / "adapter_config.json").read_text())
    return source_of(arrays, config, metadata)


def values_of(delta: Delta) -> Array:
    """A displacement, or the new values of a replacement, in float64."""
    if isinstance(delta, Replacement):
        return read_all(delta.values).astype(np.float64)
    return tile(delta, 0, prod(delta.shape), F64).reshape(delta.shape)


def read_values(source: AdapterSource, options: ReadOptions | None = None) -> dict[str, Array]:
    """Everything that an adapter says, by tensor name, in float64."""
    return {name: values_of(delta) for name, delta in read_adapter(source, options).items()}


def assert_close(got: Array, expected: Array, relative: float = 1e-6) -> None:
    """The arrays agree within ``relative`` of the largest expected magnitude."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert got.dtype == expected.dtype == np.float64
    error = np.abs(got - expected).max(initial=0)
    assert error <= relative * np.abs(expected).max(initial=0), error


def assert_same_update(
    deltas: Mapping[str, Delta], base: Mapping[str, Array], merged: Mapping[str, Array]
) -> None:
    """Base plus deltas is the merged model: each tensor of it, and no other."""
    assert set(deltas) <= set(merged), set(deltas) - set(merged)
    for name, expected in merged.items():
        if name not in deltas:
            assert np.array_equal(expected, base[name]), f"{name} changed, but has no delta"
        elif isinstance(deltas[name], Replacement):
            assert_close(values_of(deltas[name]), expected, 0)
        else:
            assert_close(values_of(deltas[name]), expected - base[name])
            assert np.abs(expected - base[name]).max() > 1e-3, f"{name} did not move"
