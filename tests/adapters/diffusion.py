"""Diffusion models of real shape in miniature, LoRAs for them, and what diffusers makes of both."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils, lora_pipeline
from diffusers.loaders import single_file_utils as single
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mergebench.core.tensor import Array

from .support import to_numpy

State = dict[str, torch.Tensor]
ROOT = "model.diffusion_model."


@cache
def model(name: str) -> Any:
    """``sd15``, ``sdxl``, ``flux``, ``clip`` or ``openclip``, with random weights in float64."""
    torch.manual_seed(len(name))
    made = _BUILD[name]().double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


def _sd15() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=2,
        sample_size=8,
        cross_attention_dim=6,
        norm_num_groups=2,
        attention_head_dim=2,
    )


def _sdxl() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        sample_size=8,
        cross_attention_dim=6,
        norm_num_groups=2,
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=18,
    )


def _flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        guidance_embeds=True,
        axes_dims_rope=(2, 1, 1),
    )


def _clip(kind: Any, **more: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=5,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        **more,
    )
    return kind(config)


_BUILD = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "flux": _flux,
    "clip": lambda: _clip(CLIPTextModel),
    "openclip": lambda: _clip(CLIPTextModelWithProjection, hidden_act="gelu"),
}


def arrays(state: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """A state dict as arrays."""
    return {name: to_numpy(value) for name, value in state.items()}


def converted(name: str, original: Mapping[str, Array]) -> dict[str, Array]:
    """What diffusers' own converter makes of a checkpoint in the original layout."""
    given = {key: torch.tensor(value) for key, value in original.items()}
    if name == "flux":
        return arrays(_flux_converter()(given))
    config = dict(model(name).config)
    return arrays(single.convert_ldm_unet_checkpoint(given, config))


def _miniature(module: Any, name: str, old: str, new: str) -> Any:
    """A converter of diffusers that knows one width only, for that of the miniature."""
    source = inspect.getsource(getattr(module, name))
    assert old in source
    place = dict(vars(module))
    exec(source.replace(old, new), place)
    return place[name]


@cache
def _flux_converter() -> Any:
    name = "convert_flux_transformer_checkpoint_to_diffusers"
    return _miniature(single, name, "inner_dim = 3072", "inner_dim = 8")


@cache
def _flux_loras() -> Any:
    name = "_convert_kohya_flux_lora_to_diffusers"
    return _miniature(
        lora_conversion_utils, name, "dims=[3072, 3072, 3072, 12288]", "dims=[8, 8, 8, 32]"
    )


def open_clip() -> dict[str, Array]:
    """The second encoder of SDXL as its checkpoints hold it."""
    own = arrays(model("openclip").state_dict())
    found: dict[str, Array] = {}
    root = "conditioner.embedders.1.model."
    for key, held in own.items():
        new = key.removeprefix("text_model.")
        for old, short in (
            ("encoder.layers.", "transformer.resblocks."),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("final_layer_norm", "ln_final"),
        ):
            new = new.replace(old, short)
        if "q_proj" in new:
            parts = [own[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[root + new.replace("self_attn.q_proj.", "attn.in_proj_")] = np.concatenate(parts)
        elif new == "text_projection.weight":
            found[f"{root}text_projection"] = held.T
        elif "k_proj" not in new and "v_proj" not in new:
            found[root + new] = held
    return found


def kohya(
    modules: Mapping[str, tuple[int, ...]], seed: int = 0, alphas: tuple[int, ...] = (2,)
) -> dict[str, Array]:
    """A LoRA of rank 3 on modules of these weight shapes, in Kohya's names; α taken in turn.

    diffusers with PEFT 0.21 leaves out an α of its own of an attention layer in a U-Net.
    """
    rank = 3
    random = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for place, (name, shape) in enumerate(sorted(modules.items())):
        ones = (1,) * (len(shape) - 2)
        found[f"{name}.lora_down.weight"] = random.normal(size=(rank, *shape[1:]))
        found[f"{name}.lora_up.weight"] = random.normal(size=(shape[0], rank, *ones))
        found[f"{name}.alpha"] = np.float64(alphas[place % len(alphas)])
    return found


def dotted(stored: Mapping[str, Array], names: Mapping[str, str], old: bool) -> dict[str, Array]:
    """The same LoRA in diffusers' names; α goes into the factor, which has no place for it."""
    found = {}
    for flat, module in names.items():
        down, up = stored[f"{flat}.lora_down.weight"], stored[f"{flat}.lora_up.weight"]
        scale = stored[f"{flat}.alpha"] / down.shape[0]
        sides = ("lora.down", "lora.up") if old else ("lora_A", "lora_B")
        found[f"{module}.{sides[0]}.weight"] = down
        found[f"{module}.{sides[1]}.weight"] = up * scale
    return found


def fused(name: str, stored: Mapping[str, Array], prefix: str = "") -> dict[str, Array]:
    """The weights of a model after diffusers loaded a LoRA and fused it."""
    given = {key: torch.tensor(value) for key, value in stored.items()}
    net = copy.deepcopy(model(name))
    if name == "flux":
        with patch.object(lora_pipeline, "_convert_kohya_flux_lora_to_diffusers", _flux_loras()):
            state, alphas = FluxLoraLoaderMixin.lora_state_dict(given, return_alphas=True)
        FluxLoraLoaderMixin.load_lora_into_transformer(
            state, network_alphas=alphas, transformer=net
        )
    else:
        config = net.config if name in ("sd15", "sdxl") else model("sdxl").config
        state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(given, unet_config=config)
        if name in ("clip", "openclip"):
            StableDiffusionXLLoraLoaderMixin.load_lora_into_text_encoder(
                state, network_alphas=alphas, text_encoder=net, prefix=prefix
            )
        else:
            StableDiffusionXLLoraLoaderMixin.load_lora_into_unet(
                state, network_alphas=alphas, unet=net
            )
    merged: dict[str, Array] = {}
    for key, module in net.named_modules():
        if hasattr(module, "base_layer"):
            module.merge()
            inner = key
            merged[f"{inner}.weight"] = to_numpy(module.base_layer.weight)
    return {**arrays(model(name).state_dict()), **merged}
