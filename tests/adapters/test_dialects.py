"""One update in many spellings: dotted names of diffusers, ComfyUI and loralib, and .bin files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mergebench.adapters_zoo.adapter import ReadOptions, is_adapter, read_adapter
from mergebench.adapters_zoo.dialects import dotted
from mergebench.core.errors import FormatError, MismatchError, ParameterError
from mergebench.core.tensor import Array
from mergebench.sources.opening import open_source
from tests.helpers.files import write

from .support import assert_close, read_values, source_of, values_of

A = np.array([[1, 2, 0], [0, 1, 4]], np.float32)
B = np.array([[1, 2], [3, 0], [0, 1], [1, 1]], np.float32)
PRODUCT = B.astype(np.float64) @ A.astype(np.float64)
UNET = "down_blocks.0.attentions.1.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0"
BASE = {
    f"{UNET}.to_q.weight": (4, 3),
    f"{UNET}.to_k.weight": (4, 3),
    f"{UNET}.to_out.0.weight": (4, 3),
    f"{TEXT}.self_attn.q_proj.weight": (4, 3),
    f"{TEXT}.self_attn.out_proj.weight": (4, 3),
    f"{TEXT}.mlp.fc1.weight": (4, 3),
    "transformer_blocks.0.attn.to_q.weight": (4, 3),
    "blocks.3.self_attn.q.weight": (4, 3),
}
OLD = "diffusers, attention processors"
#: Names of the factors, the tensor they mean, the dialect, and whether no α means scale 1.
SPELLINGS: list[tuple[str, str, str, str, bool]] = [
    (f"{UNET}.processor.to_q_lora.down.weight", f"{UNET}.processor.to_q_lora.up.weight",
     f"{UNET}.to_q", OLD, True),
    (f"unet.{UNET}.processor.to_out_lora.down.weight",
     f"unet.{UNET}.processor.to_out_lora.up.weight", f"{UNET}.to_out.0", OLD, True),
    (f"unet.{UNET}.to_k_lora.down.weight", f"unet.{UNET}.to_k_lora.up.weight",
     f"{UNET}.to_k", OLD, True),
    (f"text_encoder.{TEXT}.self_attn.to_q_lora.down.weight",
     f"text_encoder.{TEXT}.self_attn.to_q_lora.up.weight", f"{TEXT}.self_attn.q_proj", OLD, True),
    (f"text_encoder.{TEXT}.self_attn.to_out_lora.down.weight",
     f"text_encoder.{TEXT}.self_attn.to_out_lora.up.weight",
     f"{TEXT}.self_attn.out_proj", OLD, True),
    (f"unet.{UNET}.to_q.lora.down.weight", f"unet.{UNET}.to_q.lora.up.weight",
     f"{UNET}.to_q", "diffusers", True),
    (f"text_encoder.{TEXT}.mlp.fc1.lora_linear_layer.down.weight",
     f"text_encoder.{TEXT}.mlp.fc1.lora_linear_layer.up.weight",
     f"{TEXT}.mlp.fc1", "diffusers", True),
    (f"unet.{UNET}.to_q.lora_A.weight", f"unet.{UNET}.to_q.lora_B.weight",
     f"{UNET}.to_q", "diffusers", True),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
     "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
     "transformer_blocks.0.attn.to_q", "diffusers", True),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight",
     "transformer.transformer_blocks.0.attn.to_q.lora_B.default.weight",
     "transformer_blocks.0.attn.to_q", "diffusers", True),
    ("diffusion_model.blocks.3.self_attn.q.lora_A.weight",
     "diffusion_model.blocks.3.self_attn.q.lora_B.weight",
     "blocks.3.self_attn.q", "ComfyUI", True),
    ("diffusion_model.blocks.3.self_attn.q.lora_down.weight",
     "diffusion_model.blocks.3.self_attn.q.lora_up.weight",
     "blocks.3.self_attn.q", "dotted Kohya", True),
    ("transformer_blocks.0.attn.to_q.lora_A.default.weight",
     "transformer_blocks.0.attn.to_q.lora_B.default.weight",
     "transformer_blocks.0.attn.to_q", "PEFT", False),
    ("transformer.blocks.3.self_attn.q.lora_A.weight",
     "transformer.blocks.3.self_attn.q.lora_B.weight", "blocks.3.self_attn.q", "PEFT", False),
    ("blocks.3.self_attn.q.lora_A", "blocks.3.self_attn.q.lora_B",
     "blocks.3.self_attn.q", "loralib", False),
]  # fmt: skip


@pytest.mark.parametrize(("down", "up", "module", "dialect", "unscaled"), SPELLINGS)
def test_spellings(down: str, up: str, module: str, dialect: str, unscaled: bool) -> None:
    """The tensor of the base, the scale with α and without, and the dialect's name."""
    pair = {down: A, up: B}
    options = ReadOptions(base_shapes=BASE)
    vector = read_adapter(source_of(pair), ReadOptions(base_shapes=BASE, lora_alpha=3))
    parts = [part for key in pair if (part := dotted.parse(key)) is not None]

    assert is_adapter(pair, None, {})
    assert dotted.dialect_of(parts) == dialect
    assert list(vector) == [f"{module}.weight"]
    assert_close(values_of(vector[f"{module}.weight"]), 1.5 * PRODUCT, 0)
    if unscaled:
        assert_close(read_values(source_of(pair), options)[f"{module}.weight"], PRODUCT, 0)
    else:
        with pytest.raises(ParameterError, match=r"states no α.*--lora-alpha"):
            read_adapter(source_of(pair), options)


@pytest.mark.parametrize(
    "names",
    [
        (f"unet.{UNET}.to_q.lora.down.weight", f"unet.{UNET}.to_q.lora.up.weight",
         f"unet.{UNET}.to_q.alpha"),
        (f"unet.{UNET}.processor.to_q_lora.down.weight",
         f"unet.{UNET}.processor.to_q_lora.up.weight", f"unet.{UNET}.processor.to_q_lora.alpha"),
    ],
)  # fmt: skip
def test_alpha_of_the_file(names: tuple[str, str, str]) -> None:
    """An α in the file counts, whatever the user says."""
    stored: dict[str, Array] = dict(zip(names, (A, B, np.float32(4)), strict=True))
    values = read_values(source_of(stored), ReadOptions(base_shapes=BASE, lora_alpha=1))

    assert_close(values[f"{UNET}.to_q.weight"], 2 * PRODUCT, 0)


def test_language_models_named_transformer() -> None:
    """`transformer.` begins the names of GPT-2 too, whose adapters need their α."""
    name = "transformer.h.0.attn.c_attn"
    pair = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}

    with pytest.raises(ParameterError, match="states no α"):
        read_adapter(source_of(pair))


def test_merged_linear_of_loralib() -> None:
    """Three matrices in one layer: which ones were trained is not in the file."""
    pair = {"h.0.c_attn.lora_A": np.ones((4, 3)), "h.0.c_attn.lora_B": np.ones((12, 2))}

    with pytest.raises(MismatchError, match="MergedLinear"):
        read_adapter(source_of(pair), ReadOptions(lora_alpha=2))


@pytest.mark.parametrize(
    "keys",
    [
        ("lora_unet_x.lora_down", "lora_unet_x.lora_up"),
        ("lora_unet_x_lora_down.weight", "lora_unet_x_lora_up.weight"),
        ("lora_te1_x.down.weight", "lora_te1_x.up.weight"),
    ],
)
def test_malformed_kohya_names(keys: tuple[str, str], tmp_path: Path) -> None:
    """Names that only begin like Kohya's: every one is listed, with the form they should have."""
    stored = dict(zip(keys, (A, B), strict=True))
    path = write(tmp_path / "pseudo.safetensors", stored)

    with pytest.raises(FormatError) as caught:
        open_source(str(path), ReadOptions())
    assert all(key in str(caught.value) for key in keys)
    assert "pseudo.safetensors: 2 tensors belong to no adapter kind" in str(caught.value)
    assert ".lora_down.weight, .lora_up.weight or .alpha" in str(caught.value)


@pytest.mark.parametrize("suffix", ["bin", "pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["lora_unet_", "unet."])
def test_bare_files(prefix: str, suffix: str, tmp_path: Path) -> None:
    """PyTorch files mean the same as safetensors files."""
    module = "mid_block.proj" if prefix == "unet." else "mid_block_proj"
    down, up = ("lora.down", "lora.up") if prefix == "unet." else ("lora_down", "lora_up")
    names = (f"{prefix}{module}.{down}.weight", f"{prefix}{module}.{up}.weight")
    path = tmp_path / f"adapter.{suffix}"
    if suffix == "safetensors":
        write(path, dict(zip(names, (A, B), strict=True)))
    else:
        torch.save({names[0]: torch.tensor(A), names[1]: torch.tensor(B)}, path)
    deltas = open_source(
        str(path), ReadOptions(base_shapes={"mid_block.proj.weight": (4, 3)})
    ).deltas

    assert deltas is not None
    assert_close(values_of(deltas["mid_block.proj.weight"]), PRODUCT, 0)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_folders_of_diffusers(suffix: str, tmp_path: Path) -> None:
    """A folder that holds what `save_lora_weights` writes."""
    names = [f"unet.{UNET}.to_q.lora.{side}.weight" for side in ("down", "up")]
    path = tmp_path / f"pytorch_lora_weights.{suffix}"
    if suffix == "safetensors":
        write(path, dict(zip(names, (A, B), strict=True)))
    else:
        torch.save(dict(zip(names, map(torch.tensor, (A, B)), strict=True)), path)
    deltas = open_source(str(tmp_path), ReadOptions(base_shapes=BASE)).deltas

    assert deltas is not None
    assert_close(values_of(deltas[f"{UNET}.to_q.weight"]), PRODUCT, 0)


def test_models_that_hold_adapters() -> None:
    """Factors beside the weights they adapt are part of a model."""
    whole = {f"{UNET}.to_q.lora.down.weight", f"{UNET}.to_q.lora.up.weight"}

    assert is_adapter(whole, None, {})
    assert not is_adapter({*whole, f"{UNET}.to_q.weight"}, None, {})
