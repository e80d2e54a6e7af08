"""The blocks of Stable Diffusion's U-Nets, as people who merge them number them.

A U-Net of SD 1.5 (and 2.x) has blocks IN00-IN11, MID and OUT00-OUT11; one of SDXL IN00-IN08, MID
and OUT00-OUT08. Names are those of original checkpoints (``model.diffusion_model.input_blocks.4``)
and of diffusers (``down_blocks.1.resnets.0``), which number the same layers otherwise.
"""

from __future__ import annotations

import re
from typing import Literal

Net = Literal["sd15", "sdxl"]
#: Numbered input blocks of each net; as many output blocks follow the middle.
INPUTS = {"sd15": 12, "sdxl": 9}

_ORIGINAL = re.compile(
    r"(?:^|\.)diffusion_model\.(?P<part>input_blocks|middle_block|output_blocks|time_embed|"
    r"label_emb|out)\.(?P<index>\d+)?"
)
_DIFFUSERS = re.compile(
    r"^(?:unet[./])?(?:(?P<side>down|up)_blocks\.(?P<stage>\d+)\.(?P<kind>resnets|attentions|downsamplers|"
    r"upsamplers)\.(?P<index>\d+)\.|(?P<whole>mid_block|conv_in|conv_out|conv_norm_out|"
    r"time_embedding|add_embedding|class_embedding)\.)"
)
#: Layers of a stage: three slots on the way down (the third one halves the size) and on the way up.
_SLOTS = 3


def unet_block(name: str, net: Net) -> int | None:
    """Position of the tensor's block: IN00 … MID … OUT in one row.

    The time embedding counts as the first block and the last convolution as the last one, as in
    the merge-block-weighted extension of the web UI.

    Parameters
    ----------
    name : str
        Tensor name.
    net : sd15 or sdxl

    Returns
    -------
    int or None
        0 … 24 (sd15) or 0 … 18 (sdxl); ``None`` outside of the U-Net (text encoders, VAE).

    Raises
    ------
    IndexError
        For a block that this net does not have.
    """
    count = INPUTS[net]
    if (found := _ORIGINAL.search(name)) is not None:
        return _row(found["part"], int(found["index"] or 0), count)
    if (found := _DIFFUSERS.search(name)) is None:
        return None
    if found["whole"] is not None:
        return _row(_SAME.get(found["whole"], "time_embed"), 0, count)
    stage, index = int(found["stage"]), int(found["index"])
    if found["side"] == "up":
        slot = _SLOTS - 1 if found["kind"] == "upsamplers" else index
        return _row("output_blocks", stage * _SLOTS + slot, count)
    slot = _SLOTS if found["kind"] == "downsamplers" else index + 1
    return _row("input_blocks", stage * _SLOTS + slot, count)


_SAME = {
    "mid_block": "middle_block",
    "conv_in": "input_blocks",
    "conv_out": "out",
    "conv_norm_out": "out",
}


def _row(part: str, index: int, count: int) -> int:
    if part in ("input_blocks", "output_blocks") and index >= count:
        raise IndexError(f"{part}.{index}")
    if part == "output_blocks":
        return count + 1 + index
    if part == "middle_block":
        return count
    return 2 * count if part == "out" else index if part == "input_blocks" else 0
