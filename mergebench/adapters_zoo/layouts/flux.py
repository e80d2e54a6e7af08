"""FLUX.1: fused query, key and value in the original layout, apart in diffusers'."""

from __future__ import annotations

import re
from collections.abc import Collection

from mergebench.adapters_zoo.layouts.tables import Table, root_of

_ORIGINAL = ("model.diffusion_model.", "diffusion_model.", "")
_DIFFUSERS = ("", "transformer.")
_ENDS = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm.scale": ("attn.norm_q.weight",),
    "img_attn.norm.key_norm.scale": ("attn.norm_k.weight",),
    "txt_attn.norm.query_norm.scale": ("attn.norm_added_q.weight",),
    "txt_attn.norm.key_norm.scale": ("attn.norm_added_k.weight",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm.scale": ("attn.norm_q.weight",),
    "norm.key_norm.scale": ("attn.norm_k.weight",),
}
#: diffusers' last layer holds scale before shift, the original one shift before scale.
_SWAPPED = frozenset({"final_layer.adaLN_modulation.1"})


def original(names: Collection[str]) -> Table | None:
    """The table of a base in the original layout, None for other models."""
    root = root_of(names, "double_blocks.0.img_attn.qkv.weight", _ORIGINAL)
    return None if root is None else _table(names, root, "transformer.", root)


def diffusers(names: Collection[str]) -> Table | None:
    """The table of a base in diffusers' layout, None for other models."""
    root = root_of(names, "transformer_blocks.0.attn.add_q_proj.weight", _DIFFUSERS)
    if root is None or f"{root}single_transformer_blocks.0.proj_mlp.weight" not in names:
        return None
    return _table(names, _ORIGINAL[0], root, root)


def _table(names: Collection[str], original: str, diffusers: str, own: str) -> Table:
    prefixes: dict[str, tuple[str, ...]] = {one: (two,) for one, two in _ENDS.items()}
    stacks = (
        ("double_blocks", "transformer_blocks", _DOUBLE),
        ("single_blocks", "single_transformer_blocks", _SINGLE),
    )
    for stack, theirs, inner in stacks:
        form = re.compile(rf"{re.escape(own)}(?:{stack}|{theirs})\.(\d+)\.")
        indexes = {int(match[1]) for name in names if (match := form.match(name))}
        for index in sorted(indexes):
            prefixes |= {
                f"{stack}.{index}.{one}": tuple(f"{theirs}.{index}.{two}" for two in each)
                for one, each in inner.items()
            }
    return Table(prefixes, original, diffusers, _SWAPPED)
