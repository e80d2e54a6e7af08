"""Tiny models of transformers, diffusers and PEFT, saved by these libraries."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def llama(**config: Any) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, **config))


def tied_llama() -> LlamaForCausalLM:
    """One whose head is its embedding."""
    return llama(tie_word_embeddings=True)


def bert() -> BertModel:
    """A small BERT."""
    return BertModel(BertConfig(**SIZES))


def mixtral() -> MixtralForCausalLM:
    """A small mixture of experts, whose experts are one tensor each on disk and one together."""
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    return MixtralForCausalLM(config)


def unet() -> UNet2DConditionModel:
    """A small U-Net of a diffusion pipeline."""
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=2,
    )


def save_tuned(folder: Path, build: Any, **options: Any) -> None:
    """``base``, ``ft1`` and ``ft2``: a model and two with noise on every parameter."""
    torch.manual_seed(0)
    base = build()
    base.save_pretrained(folder / "base", **options)
    for name in ("ft1", "ft2"):
        with torch.no_grad():
            tuned = copy.deepcopy(base)
            for parameter in tuned.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        tuned.save_pretrained(folder / name, **options)


def save_loras(folder: Path) -> None:
    """The adapters ``lora1`` and ``lora2`` on the Llama in ``base``."""
    torch.manual_seed(1)
    for name in ("lora1", "lora2"):
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        with catch_warnings():
            # PEFT asks transformers for what the latter calls by another name now.
            simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(llama(), config)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn_like(parameter))
        adapted.save_pretrained(folder / name)
