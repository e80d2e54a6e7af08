"""Models whose two layouts are known, but not how one becomes the other."""

from __future__ import annotations

from collections.abc import Collection

_SD3 = "Stable Diffusion 3 is not mapped between its layouts: give --base with "


def unmapped(key: str, names: Collection[str]) -> str:
    """The next step where an adapter and its base have different layouts of such a model.

    Parameters
    ----------
    key : str
        A tensor of the adapter that fits nothing in the base.
    names : collection of str
        Tensors of the base.

    Returns
    -------
    str
        Empty where this is not what is wrong.
    """
    original = any("joint_blocks.0." in name for name in names)
    # FLUX has the first of these too, and single blocks besides.
    diffusers = any(name.endswith("transformer_blocks.0.attn.add_q_proj.weight") for name in names)
    diffusers = diffusers and any(name.endswith("pos_embed.proj.weight") for name in names)
    if original and "transformer_blocks" in key:
        return f"{_SD3}the transformer of a diffusers folder, whose names the adapter has"
    if diffusers and "joint_blocks" in key:
        return f"{_SD3}the single file, whose names the adapter has"
    return ""
