"""Kohya's names: files written by hand, displacements worked out by hand."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mergebench.adapters_zoo.adapter import ReadOptions, read_adapter
from mergebench.core.delta import LowRank
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import Array

from .support import assert_close, read_values, source_of

TO_Q = "lora_unet_down_blocks_0_attentions_1_to_q"
#: B A = [[1·1, 1·2, 1·0], [3·1, 3·2, 3·0]] + [[2·0, 2·1, 2·4], [0, 0, 0]]
DOWN = np.array([[1, 2, 0], [0, 1, 4]], np.float32)
UP = np.array([[1, 2], [3, 0]], np.float32)
PRODUCT = np.array([[1, 4, 8], [3, 6, 0]], np.float64)


def kohya(
    module: str = TO_Q, down: Array = DOWN, up: Array = UP, alpha: Any = None
) -> dict[str, Array]:
    """The tensors of one module; α only where it is given."""
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    return tensors if alpha is None else {**tensors, f"{module}.alpha": np.asarray(alpha)}


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),
        (np.float32(1), 0.5),
        (np.float16(4), 2.0),
        (np.float64([3]), 1.5),
        (np.int64(2), 1.0),
        (ml_dtypes.bfloat16(-1), -0.5),
    ],
)
def test_scale_is_alpha_over_rank(alpha: Any, scale: float) -> None:
    """α of any dtype, of shape () or (1,); without α the scale is 1."""
    values = read_values(source_of(kohya(alpha=alpha)))

    assert list(values) == [f"{TO_Q}.weight"]
    assert_close(values[f"{TO_Q}.weight"], scale * PRODUCT, 0)


def test_alpha_of_the_user_where_the_file_has_none() -> None:
    """``--lora-alpha`` replaces scale 1, and never an α of the file."""
    files = kohya(alpha=None) | kohya("lora_te_text_model_fc1", alpha=np.float32(1))
    values = read_values(source_of(files), ReadOptions(lora_alpha=8))

    assert_close(values[f"{TO_Q}.weight"], 4 * PRODUCT, 0)
    assert_close(values["lora_te_text_model_fc1.weight"], 0.5 * PRODUCT, 0)


def test_convolution() -> None:
    """A kernel lives in the down factor: ΔW[o, i, y, x] = Σᵣ up[o, r] · down[r, i, y, x]."""
    down = np.arange(2 * 3 * 3 * 3, dtype=np.float32).reshape(2, 3, 3, 3)
    up = np.array([[1, 0], [0, 1], [2, -1]], np.float32).reshape(3, 2, 1, 1)
    expected = np.stack([down[0], down[1], 2 * down[0] - down[1]]).astype(np.float64) / 2
    values = read_values(source_of(kohya(down=down, up=up, alpha=np.float32(1))))

    assert_close(values[f"{TO_Q}.weight"], expected, 0)


@pytest.mark.parametrize("stored", [(2, 3), (2, 3, 1, 1)])
@pytest.mark.parametrize("ones", [(), (1, 1)])
def test_linear_and_1x1_convolution_are_the_same(
    stored: tuple[int, ...], ones: tuple[int, ...]
) -> None:
    """Models differ in whether a projection is a 1x1 convolution; the base decides."""
    tensors = kohya(down=DOWN.reshape(2, 3, *ones), up=UP.reshape(2, 2, *ones))
    shapes = {"down_blocks.0.attentions.1.to_q.weight": stored}
    values = read_values(source_of(tensors), ReadOptions(base_shapes=shapes))

    assert_close(values["down_blocks.0.attentions.1.to_q.weight"], PRODUCT.reshape(stored), 0)


@pytest.mark.parametrize(
    ("module", "base"),
    [
        ("lora_unet_down_blocks_0_attentions_1_to_q", "down_blocks.0.attentions.1.to_q"),
        ("lora_unet_mid_block_to_out_0", "unet.mid_block.to_out.0"),
        ("lora_unet_input_blocks_4_1_proj_in", "model.diffusion_model.input_blocks.4.1.proj_in"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te1_text_model_fc1", "text_encoder.text_model.fc1"),
        ("lora_te2_text_model_fc1", "text_encoder_2.text_model.fc1"),
        ("lora_transformer_single_blocks_7_linear1", "single_blocks.7.linear1"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "double_blocks.0.img_attn.qkv"),
    ],
)
def test_names_of_the_base(module: str, base: str) -> None:
    """The prefix goes, underscores are matched against the base's dots."""
    shapes = {
        f"{base}.weight": (2, 3),
        "text_encoder.text_model.fc1.weight": (2, 3),
        "text_encoder_2.text_model.fc1.weight": (2, 3),
        "conv_proj_in.weight": (2, 3),
        "blocks.7.linear1.bias": (2,),
    }
    delta = read_adapter(source_of(kohya(module)), ReadOptions(base_shapes=shapes))

    assert list(delta) == [f"{base}.weight"]
    assert isinstance(delta[f"{base}.weight"], LowRank)


def test_whole_paths_come_first() -> None:
    """A module of exactly this path is meant, even if another path ends like it."""
    shapes = {"to_q.weight": (2, 3), "inner.to_q.weight": (2, 3)}
    vector = read_adapter(source_of(kohya("lora_unet_to_q")), ReadOptions(base_shapes=shapes))

    assert list(vector) == ["to_q.weight"]


def test_ambiguous_underscores() -> None:
    """Two modules of the base that flatten to one name are listed, not chosen between."""
    shapes = {"a.b_c.weight": (2, 3), "a_b.c.weight": (2, 3)}
    with pytest.raises(MismatchError, match=r"lora_unet_a_b_c\..*a\.b_c\.weight, a_b\.c\.weight"):
        read_adapter(source_of(kohya("lora_unet_a_b_c")), ReadOptions(base_shapes=shapes))


def test_ambiguous_text_encoders() -> None:
    """A prefix that names no component does not choose between two text encoders."""
    shapes = {"one.text_model.fc1.weight": (2, 3), "two.text_model.fc1.weight": (2, 3)}
    with pytest.raises(MismatchError, match=r"several tensors.*one\.text_model.*two\.text_model"):
        read_adapter(source_of(kohya("lora_te_text_model_fc1")), ReadOptions(base_shapes=shapes))


def test_no_counterpart_in_the_base() -> None:
    """The error names the tensor and what the base has instead."""
    shapes = {"down_blocks.0.attentions.1.to_k.weight": (2, 3)}
    with pytest.raises(MismatchError, match=rf"{TO_Q}\.lora_down\.weight fits no .*to_k\.weight"):
        read_adapter(source_of(kohya()), ReadOptions(base_shapes=shapes))


def test_wrong_shape() -> None:
    """The error names the factors, the tensor of the base and both shapes."""
    shapes = {"down_blocks.0.attentions.1.to_q.weight": (2, 4)}
    pattern = rf"{TO_Q}\.lora_up\.weight.*to_q\.weight, expected shape \(2, 4\), got \(2, 3\)"
    with pytest.raises(MismatchError, match=pattern):
        read_adapter(source_of(kohya()), ReadOptions(base_shapes=shapes))


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ("dora_scale", "DoRA.*give --base"),
        ("lora_mid.weight", "no core of a convolution"),
        ("hada_w1_a", "LoHa.*among tensors of another kind"),
    ],
)
def test_refused_features(extra: str, word: str) -> None:
    """What changes ΔW and is not supported is refused by name."""
    tensors = kohya() | {f"{TO_Q}.{extra}": np.ones((2, 1), np.float32)}
    with pytest.raises(FormatError, match=rf"{TO_Q}\.{extra}.*{word}"):
        read_adapter(source_of(tensors))


@pytest.mark.parametrize("alpha", [np.float32(0), np.float32(np.nan), np.float32([1, 2])])
def test_alpha_that_is_none(alpha: Any) -> None:
    """α = 0 means scale 0 to some programs and 1 to others."""
    with pytest.raises(FormatError, match=rf"{TO_Q}\.alpha is no α"):
        read_adapter(source_of(kohya(alpha=alpha)))


def test_factor_without_partner() -> None:
    """One factor alone is no update."""
    tensors = kohya()
    del tensors[f"{TO_Q}.lora_up.weight"]
    with pytest.raises(FormatError, match=rf"only one of.*{TO_Q}\.lora_down\.weight"):
        read_adapter(source_of(tensors))


def test_alpha_without_factors() -> None:
    """An α of a module that the file does not adapt is not passed over."""
    tensors = kohya() | {"lora_unet_other.alpha": np.float32(1)}
    with pytest.raises(FormatError, match=r"1 tensors belong to no.*lora_unet_other\.alpha"):
        read_adapter(source_of(tensors))


def test_config_beside_kohya_names() -> None:
    """Scale 1 by convention against a config that says otherwise: neither is believed."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16}
    with pytest.raises(FormatError, match=rf"{TO_Q} has no \.alpha.*adapter_config"):
        read_adapter(source_of(kohya(), config))
