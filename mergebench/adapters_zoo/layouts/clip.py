"""Text encoders inside checkpoints of diffusion models: CLIP and T5, and OpenCLIP's own layout."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from mergebench.adapters_zoo.layouts.tables import Table

#: Roots of encoders in the layout of transformers -> the component of the pipeline.
RENAMED: Mapping[str, str] = {
    "cond_stage_model.transformer.": "text_encoder.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.t5xxl.transformer.": "text_encoder_2.",
}
_OPEN_CLIP: Mapping[str, str] = {
    "conditioner.embedders.1.model.": "text_encoder_2.",
    "conditioner.embedders.0.model.": "text_encoder_2.",
    "cond_stage_model.model.": "text_encoder.",
}
_LAYER: dict[str, tuple[str, ...]] = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
    "attn.out_proj": ("self_attn.out_proj",),
    **{
        f"attn.in_proj_{param}": tuple(f"self_attn.{part}_proj.{param}" for part in "qkv")
        for param in ("weight", "bias")
    },
}


def renamed(names: Collection[str]) -> dict[str, str]:
    """Tensors of encoders in the layout of transformers -> their names in a pipeline."""
    found: dict[str, str] = {}
    for root, component in RENAMED.items():
        own = [name for name in names if name.startswith(root)]
        # Checkpoints of the first year lack one level.
        level = "text_model." if any(n.startswith(f"{root}embeddings.") for n in own) else ""
        found |= {name: f"{component}{level}{name.removeprefix(root)}" for name in own}
    return found


def original(names: Collection[str]) -> list[Table]:
    """Tables of the encoders in OpenCLIP's layout."""
    tables = []
    for root, component in _OPEN_CLIP.items():
        form = re.compile(rf"{re.escape(root)}transformer\.resblocks\.(\d+)\.")
        indexes = {int(match[1]) for name in names if (match := form.match(name))}
        if not indexes:
            continue
        prefixes: dict[str, tuple[str, ...]] = {
            "token_embedding": ("embeddings.token_embedding",),
            "positional_embedding": ("embeddings.position_embedding.weight",),
            "ln_final": ("final_layer_norm",),
        }
        for index in sorted(indexes):
            prefixes |= {
                f"transformer.resblocks.{index}.{one}": tuple(
                    f"encoder.layers.{index}.{two}" for two in each
                )
                for one, each in _LAYER.items()
            }
        tables.append(Table(prefixes, root, f"{component}text_model."))
    return tables
