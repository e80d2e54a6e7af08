"""Names as Kohya's trainers save them: ``lora_unet_<path_with_underscores>.lora_down.weight``.

The dots of the module path are written as underscores, which cannot be undone from the name
alone: names are resolved against the real modules of the base (``resolve``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mergebench.adapters_zoo.dialects import Part, Role

#: Prefix -> the folders or attributes under which a pipeline keeps that component.
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "lora_te1_": ("text_encoder", "text_encoders.clip_l"),
    "lora_te2_": ("text_encoder_2", "text_encoders.clip_g"),
    "lora_te3_": ("text_encoder_3", "text_encoder_2", "text_encoders.t5xxl"),
    "lora_te_": ("text_encoder",),
    "lora_transformer_": ("transformer", "model.diffusion_model", "diffusion_model"),
    "lora_unet_": ("unet", "transformer", "model.diffusion_model", "diffusion_model"),
}
_SUFFIX: Mapping[Role, str] = {
    "A": "lora_down.weight",
    "B": "lora_up.weight",
    "mid": "lora_mid.weight",
    "alpha": "alpha",
}
_ROLES: Mapping[str, Role] = {suffix: role for role, suffix in _SUFFIX.items()}
_NAME = re.compile(r"(?P<module>lora_[^.]+)\.(?P<suffix>lora_(?:down|up|mid)\.weight|alpha)")


def parse(key: str) -> Part | None:
    """What a tensor is, from its name alone; None for a name of another dialect."""
    match = _NAME.fullmatch(key)
    return Part(match["module"], _ROLES[match["suffix"]], dialect="Kohya") if match else None


def component(module: str) -> tuple[str, str]:
    """``(prefix, path)`` of a module: ``("lora_te1_", "text_model_encoder_…")``.

    The prefix is ``""`` where it is none of :data:`COMPONENTS`.
    """
    for prefix in COMPONENTS:
        if module.startswith(prefix):
            return prefix, module.removeprefix(prefix)
    return "", module


def flatten(module: str) -> str:
    """A dotted module path as Kohya writes it."""
    return module.replace(".", "_")


def spell(module: str, role: Role) -> str:
    """The name of a tensor of ``module``, which already carries its prefix.

    Raises
    ------
    ValueError
        For a role that the dialect has no name for (a programming error).
    """
    if role not in _SUFFIX:
        raise ValueError(f"Kohya's names have none for {role!r}")
    return f"{module}.{_SUFFIX[role]}"
