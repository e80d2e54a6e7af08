"""Dotted names: what PEFT saves, and how diffusers, ComfyUI, loralib and others spell the same.

``unet.….to_q.lora.down.weight``, ``….attn1.processor.to_q_lora.up.weight`` (diffusers before
PEFT), ``….q_proj.lora_linear_layer.up.weight`` (its text encoders), ``diffusion_model.….
lora_down.weight`` (ComfyUI), ``….lora_B`` (loralib, and ComfyUI for Mochi). All are read as
factors A and B of a module; prefixes of components stay in the module's path.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from mergebench.adapters_zoo.dialects import Part, Role, peft

_SIDES: dict[str, Role] = {
    "down.weight": "A",
    "up.weight": "B",
    "alpha": "alpha",
    "A": "A",
    "B": "B",
}
_SIDE = r"(?P<side>down\.weight|up\.weight)"
_FORMS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "diffusers, attention processors",
        re.compile(
            # XLabs' processors for FLUX hold other matrices under like names.
            r"(?P<module>.+?)(?:\.processor)?\.(?P<inner>(?!(?:qkv|proj)_lora)\w+)_lora\."
            r"(?P<side>down\.weight|"
            r"up\.weight|alpha)"
        ),
    ),
    ("diffusers", re.compile(rf"(?P<module>.+)\.lora\.{_SIDE}")),
    ("diffusers", re.compile(rf"(?P<module>.+)\.lora_linear_layer\.{_SIDE}")),
    ("dotted Kohya", re.compile(rf"(?P<module>.+\..+)\.lora_{_SIDE}")),
    ("loralib", re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)")),
)
#: Dialects whose files mean scale 1 where they hold no α.
UNSCALED = frozenset({"diffusers, attention processors", "diffusers", "dotted Kohya", "ComfyUI"})
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_PARTS = re.compile(r"(unet|transformer(_\d)?|text_encoder(_\d)?|text_encoders)\.")
# `transformer.` alone also begins the names of GPT-2 and MPT.
_DIFFUSERS = re.compile(
    r"(unet|text_encoder(_\d)?)\.|transformer(_\d)?\.(single_)?transformer_blocks\."
)
_COMFY = re.compile(r"(model\.)?diffusion_model\.|text_encoders\.")


def parse(key: str) -> Part | None:
    """What a tensor is, from its name alone; as :func:`peft.parse` for all other names."""
    name = peft.strip(key)
    for dialect, form in _FORMS:
        if (match := form.fullmatch(name)) is None or ".base_layer" in name:
            continue
        module = match["module"]
        if "inner" in match.groupdict():
            # Text encoders call the projections otherwise than U-Nets.
            inner = match["inner"]
            own = _TEXT.get(inner) if module.endswith("self_attn") else None
            module = f"{module}.{own or ('to_out.0' if inner == 'to_out' else inner)}"
        return Part(module, _SIDES[match["side"]], dialect=dialect)
    part = peft.parse(key)
    if part is not None and part.role in ("A", "B") and not key.startswith(peft.PREFIX):
        if _COMFY.match(name):
            return replace(part, dialect="ComfyUI")
        if _PARTS.match(name):
            return replace(part, dialect="diffusers or PEFT")
    return part


def is_component(name: str) -> bool:
    """Whether a dotted name begins with a component of a diffusion pipeline."""
    return bool(_DIFFUSERS.match(name) or _COMFY.match(name))


def dialect_of(parts: Collection[Part]) -> str:
    """The dialect of a file's factors, ``""`` where it holds none; several are joined.

    A ``transformer.`` may begin PEFT's names of a language model; it is read as diffusers'
    where a module is one that only diffusers has.
    """
    factors = [part for part in parts if part.role in ("A", "B", "embedding_A", "embedding_B")]
    ours = any(_DIFFUSERS.match(part.module) for part in factors)
    found = {
        part.dialect.replace("diffusers or PEFT", "diffusers" if ours else "PEFT")
        for part in factors
    }
    return "; ".join(sorted(found))
