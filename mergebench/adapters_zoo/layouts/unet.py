"""The U-Nets of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from mergebench.adapters_zoo.layouts.tables import Table, root_of

_ORIGINAL = ("model.diffusion_model.", "diffusion_model.", "")
_DIFFUSERS = ("", "unet.")
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def original(names: Collection[str]) -> Table | None:
    """The table of a base in the original layout, None for other models."""
    root = root_of(names, "input_blocks.1.0.in_layers.0.weight", _ORIGINAL)
    if root is None:
        return None
    own = {name.removeprefix(root) for name in names if name.startswith(root)}
    return Table(_table(_stages_of_original(own)), root, "unet.")


def diffusers(names: Collection[str]) -> Table | None:
    """The table of a base in diffusers' layout, None for other models."""
    root = root_of(names, "time_embedding.linear_1.weight", _DIFFUSERS)
    if root is None or f"{root}down_blocks.0.resnets.0.conv1.weight" not in names:
        return None
    own = {name.removeprefix(root) for name in names if name.startswith(root)}
    return Table(_table(_stages_of_diffusers(own)), _ORIGINAL[0], root)


@dataclass(frozen=True)
class _Stage:
    """Layers between two samplers; whether they attend, and whether a sampler ends them."""

    layers: int
    attends: bool
    sampled: bool


#: On the way down, and on the way up.
_Stages = tuple[list[_Stage], list[_Stage]]


def _stages_of_original(own: Collection[str]) -> _Stages:
    """Cut the running numbers of the layers at the samplers."""
    modules = {name.rpartition(".")[0] for name in own}
    down: list[list[int]] = [[]]
    up: list[list[int]] = [[]]
    for index in range(1, _count(own, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{index}.0.op" in modules:
            down.append([])
        else:
            down[-1].append(index)
    for index in range(_count(own, r"output_blocks\.(\d+)\.")):
        up[-1].append(index)
        if any(f"output_blocks.{index}.{slot}.conv" in modules for slot in (1, 2)):
            up.append([])
    return tuple(  # type: ignore[return-value]
        [
            _Stage(len(each), f"{side}.{each[0]}.1.norm" in modules, place < len(stages) - 1)
            for place, each in enumerate(stages)
            if each
        ]
        for side, stages in (("input_blocks", down), ("output_blocks", up))
    )


def _stages_of_diffusers(own: Collection[str]) -> _Stages:
    modules = {name.rpartition(".")[0] for name in own}
    return tuple(  # type: ignore[return-value]
        [
            _Stage(
                _count(own, rf"{way}_blocks\.{stage}\.resnets\.(\d+)\."),
                f"{way}_blocks.{stage}.attentions.0.norm" in modules,
                f"{way}_blocks.{stage}.{way}samplers.0.conv" in modules,
            )
            for stage in range(_count(own, rf"{way}_blocks\.(\d+)\."))
        ]
        for way in ("down", "up")
    )


def _count(own: Collection[str], pattern: str) -> int:
    form = re.compile(pattern)
    return max((int(match[1]) + 1 for name in own if (match := form.match(name))), default=0)


def _table(stages: _Stages) -> dict[str, tuple[str, ...]]:
    pairs = dict(_ENDS)
    blocks: list[tuple[str, str]] = [("middle_block.0", "mid_block.resnets.0")]
    blocks.append(("middle_block.2", "mid_block.resnets.1"))
    pairs["middle_block.1"] = "mid_block.attentions.0"
    down, up = stages
    index = 1
    for place, stage in enumerate(down):
        for layer in range(stage.layers):
            blocks.append((f"input_blocks.{index}.0", f"down_blocks.{place}.resnets.{layer}"))
            pairs[f"input_blocks.{index}.1"] = f"down_blocks.{place}.attentions.{layer}"
            index += 1
        if stage.sampled:
            pairs[f"input_blocks.{index}.0.op"] = f"down_blocks.{place}.downsamplers.0.conv"
            index += 1
    index = 0
    for place, stage in enumerate(up):
        for layer in range(stage.layers):
            blocks.append((f"output_blocks.{index}.0", f"up_blocks.{place}.resnets.{layer}"))
            if stage.attends:
                pairs[f"output_blocks.{index}.1"] = f"up_blocks.{place}.attentions.{layer}"
            index += 1
        if stage.sampled:
            # Where nothing attends, the sampler takes that place.
            key = f"output_blocks.{index - 1}.{1 + stage.attends}.conv"
            pairs[key] = f"up_blocks.{place}.upsamplers.0.conv"
    for one, two in blocks:
        pairs |= {f"{one}.{inner}": f"{two}.{name}" for inner, name in _RESNET.items()}
    return {prefix: (target,) for prefix, target in pairs.items()}
