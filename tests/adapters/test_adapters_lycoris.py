"""Modules made by LyCORIS mean the same to us as to LyCORIS."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

from mergebench.adapters_zoo.adapter import ReadOptions, read_adapter
from mergebench.core.delta import LowRank
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import ArrayTensor

from .support import assert_close, source_of, to_numpy, values_of

NAME = "lora_unet_mid_block_proj"
TARGET = "mid_block.proj.weight"
LINEAR, CONV, POINT = nn.Linear(6, 8), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 1)
CASES: dict[str, tuple[Any, nn.Module, dict[str, Any]]] = {
    "lora": (LoConModule, LINEAR, {}),
    "lora conv": (LoConModule, CONV, {}),
    "lora tucker": (LoConModule, CONV, {"use_tucker": True}),
    "lora point": (LoConModule, POINT, {}),
    "loha": (LohaModule, LINEAR, {}),
    "loha conv": (LohaModule, CONV, {}),
    "loha tucker": (LohaModule, CONV, {"use_tucker": True}),
    "loha point": (LohaModule, POINT, {}),
    "lokr": (LokrModule, LINEAR, {"lora_dim": 1, "factor": 2}),
    "lokr full": (LokrModule, LINEAR, {"lora_dim": 100, "factor": 2}),
    "lokr both": (LokrModule, LINEAR, {"lora_dim": 1, "factor": 4, "decompose_both": True}),
    "lokr conv": (LokrModule, CONV, {"lora_dim": 1, "factor": 2}),
    "lokr tucker": (LokrModule, CONV, {"lora_dim": 1, "factor": 2, "use_tucker": True}),
    "lokr point": (LokrModule, POINT, {"lora_dim": 1, "factor": 2}),
}


def made(case: str) -> tuple[nn.Module, Any]:
    """The adapted layer, and its adapter with random parameters."""
    kind, layer, options = CASES[case]
    generator = torch.Generator().manual_seed(3)
    module = kind(NAME, layer.double(), **{"lora_dim": 2, "alpha": 3.0, **options}).double()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
    return layer, module


@pytest.mark.parametrize("case", CASES)
def test_reads_what_lycoris_adds(case: str) -> None:
    """The displacement that LyCORIS computes, in the shape of the base's weight."""
    layer, module = made(case)
    stored = {f"{NAME}.{key}": to_numpy(value) for key, value in module.custom_state_dict().items()}
    weight = to_numpy(layer.weight.detach())
    shapes = {TARGET: weight.shape, "mid_block.proj.bias": (weight.shape[0],)}
    options = ReadOptions(base_shapes=shapes, base={TARGET: ArrayTensor(weight)})
    deltas = read_adapter(source_of(stored), options)
    # What a forward pass adds; LyCORIS' get_diff_weight scales some kinds twice.
    shape = layer.weight.shape
    added = module.get_diff_weight(1.0, shape)[0] if "lora" in case else module.get_weight(shape)
    expected = to_numpy(added).astype(np.float64)
    assert set(deltas) - {"mid_block.proj.bias"} == {TARGET}
    assert_close(values_of(deltas[TARGET]), expected.reshape(weight.shape))
    assert np.abs(expected).max() > 1e-3
    assert ("lora" in case) == isinstance(deltas[TARGET], LowRank)


@pytest.mark.parametrize(("weight", "bias"), [("diff", "diff_b"), ("w_norm", "b_norm")])
def test_full_differences(weight: str, bias: str) -> None:
    """Weights, biases and norms trained whole are stored as differences."""
    arrays = {"weight": np.arange(6.0).reshape(2, 3), "bias": np.array([7.0, -8.0])}
    stored = {f"{NAME}.{weight}": arrays["weight"], f"{NAME}.{bias}": arrays["bias"]}
    shapes = {f"mid_block.proj.{name}": array.shape for name, array in arrays.items()}
    deltas = read_adapter(source_of(stored), ReadOptions(base_shapes=shapes))
    for name, array in arrays.items():
        assert_close(values_of(deltas[f"mid_block.proj.{name}"]), array, 0)
    shapes["mid_block.proj.bias"] = (3,)
    with pytest.raises(MismatchError, match=rf"{NAME}.{bias} does not fit mid_block.proj.bias"):
        read_adapter(source_of(stored), ReadOptions(base_shapes=shapes))


def test_no_alpha_means_scale_one() -> None:
    """As in every program that reads these names."""
    layer, module = made("loha")
    stored = {f"{NAME}.{key}": to_numpy(value) for key, value in module.custom_state_dict().items()}
    options = ReadOptions(base_shapes={TARGET: tuple(layer.weight.shape)})
    scaled = values_of(read_adapter(source_of(stored), options)[TARGET])
    del stored[f"{NAME}.alpha"]
    plain = values_of(read_adapter(source_of(stored), options)[TARGET])
    assert_close(scaled, plain * 1.5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lora_down": None}, FormatError, "no lora_down"),
        ({"lora_mid": (2, 2)}, FormatError, "no core"),
        ({"lora_mid": (2, 3, 3, 3)}, MismatchError, r"lora_down\.weight does not fit"),
        ({"lora_mid": (3, 2, 3, 3)}, MismatchError, "columns of .*lora_up"),
        ({"lora_down": (2, 4, 3, 3)}, MismatchError, "no kernel"),
    ],
)
def test_cores_that_do_not_fit(change: dict[str, Any], error: type[Exception], words: str) -> None:
    """The tensor that is wrong is named."""
    _, module = made("lora tucker")
    stored = {f"{NAME}.{key}": to_numpy(value) for key, value in module.custom_state_dict().items()}
    for role, shape in change.items():
        stored[f"{NAME}.{role}.weight"] = np.ones(shape or (1,))
        if shape is None:
            del stored[f"{NAME}.{role}.weight"]
    with pytest.raises(error, match=words):
        read_adapter(source_of(stored))
