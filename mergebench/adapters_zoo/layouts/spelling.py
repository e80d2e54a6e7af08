"""Modules of a written LoRA: what a program calls the weights of a base."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mergebench.adapters_zoo.dialects import kohya
from mergebench.adapters_zoo.layouts.view import View
from mergebench.core.errors import MismatchError

_COMPONENT = re.compile(r"(unet|transformer|text_encoder(?:_[23])?)\.(.+)")
_ROOT = re.compile(r"(?:model\.)?diffusion_model\.")
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Named:
    """A module of the file, and the rows of the displaced weight that it displaces.

    Attributes
    ----------
    module : str
        As the dialect spells it.
    rows : tuple of (int, int)
        Starts and ends of ranges that follow each other; empty for all rows.
    """

    module: str
    rows: tuple[tuple[int, int], ...] = ()


def spelled(
    names: Collection[str], dialect: str, view: View | None, component: str | None
) -> dict[str, tuple[Named, ...]]:
    """The modules of each displaced tensor in Kohya's or in diffusers' names.

    Parameters
    ----------
    names : collection of str
        Tensors of the base, or of adapters without one.
    dialect : kohya or diffusers
    view : View or None
        The base in both layouts, where it is a diffusion model.
    component : str or None
        What a base with bare names is in its pipeline, such as ``unet``.

    Raises
    ------
    MismatchError
        If the dialect has no name for one.
    """
    pieces = {} if view is None else _pieces(view)
    several = any(name.startswith("text_encoder_2.") for name in names)
    found = {}
    for name in names:
        if dialect == "diffusers":
            found[name] = _diffusers(name, view, pieces, component)
        else:
            found[name] = _kohya(name, view, pieces, component, several)
    return found


def _pieces(view: View) -> dict[str, tuple[Named, ...]]:
    """Own tensor -> the tensors of the other layout that are made of its rows alone."""
    found: dict[str, list[Named]] = {}
    for other, spans in view.other.items():
        (name, *more) = {span.name for span in spans}
        if more or not other.endswith(_WEIGHT):
            continue
        rows = tuple((s.start, s.start + s.rows) for s in sorted(spans, key=lambda span: span.at))
        whole = rows == ((0, view.own[name][0]),)
        found.setdefault(name, []).append(Named(other.removesuffix(_WEIGHT), () if whole else rows))
    return {name: tuple(each) for name, each in found.items()}


def _diffusers(
    name: str, view: View | None, pieces: Mapping[str, tuple[Named, ...]], component: str | None
) -> tuple[Named, ...]:
    if view is not None and view.layout == "original":
        if name not in pieces:
            raise MismatchError(
                f"{name}: has no name in diffusers' layout",
                fix="leave it out with --exclude, or write the task vector itself (--as delta)",
            )
        return pieces[name]
    module = name.removesuffix(_WEIGHT)
    if _COMPONENT.match(module) or _ROOT.match(module):
        return (Named(module),)
    if component is None:
        raise MismatchError(
            f"{name}: diffusers' names begin with a model of the pipeline, and nothing says which "
            "one this is",
            fix="name it with --part",
        )
    return (Named(f"{component}.{module}"),)


def _kohya(
    name: str,
    view: View | None,
    pieces: Mapping[str, tuple[Named, ...]],
    component: str | None,
    several: bool,
) -> tuple[Named, ...]:
    module = name.removesuffix(_WEIGHT)
    if kohya.component(module)[0] and "." not in module:
        return (Named(module),)
    several |= view is not None and view.family != "sd"
    if view is not None and view.layout == "original":
        if view.family != "sd" and (root := _root(view, module)) is not None:
            return (Named("lora_unet_" + kohya.flatten(module.removeprefix(root))),)
        if name not in pieces:
            raise MismatchError(
                f"{name}: has no name in Kohya's format",
                fix="leave it out with --exclude, or write the task vector itself (--as delta)",
            )
        return tuple(Named(_flat(each.module, several), each.rows) for each in pieces[name])
    if view is not None and view.family == "sdxl" and name in pieces:
        # sd-scripts trains SDXL in the original layout, SD 1.x in diffusers'.
        return tuple(
            Named("lora_unet_" + kohya.flatten(_ROOT.sub("", each.module)), each.rows)
            for each in pieces[name]
        )
    if _COMPONENT.match(module) is None and component is not None:
        module = f"{component}.{module}"
    return (Named(_flat(module, several)),)


def _root(view: View, module: str) -> str | None:
    """The root of the U-Net's or transformer's names; None for other components."""
    if (match := _ROOT.match(module)) is not None:
        return match[0]
    first = module.partition(".")[0]
    bare = {"input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"}
    bare |= {"double_blocks", "single_blocks", "img_in", "txt_in", "time_in", "vector_in"}
    return "" if first in {*bare, "guidance_in", "final_layer"} else None


def _flat(module: str, several: bool) -> str:
    """A dotted module with its component as Kohya writes it; bare ones count as the U-Net."""
    match = _COMPONENT.match(_ROOT.sub("unet.", module))
    part, path = ("unet", module) if match is None else (match[1], match[2])
    first = "lora_te1_" if several else "lora_te_"
    prefix = {
        "unet": "lora_unet_",
        "transformer": "lora_transformer_",
        "text_encoder": first,
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
    }[part]
    return prefix + kohya.flatten(path)


def component_of(config: Mapping[str, Any] | None) -> str | None:
    """What a model is in its pipeline, from its config; None where that does not tell."""
    named = (config or {}).get("architectures") or [(config or {}).get("_class_name")]
    name = str(named[0] if isinstance(named, list) and named else named)
    if name == "CLIPTextModelWithProjection" or name.startswith("T5"):
        return "text_encoder_2"
    if name == "CLIPTextModel":
        return "text_encoder"
    if name.startswith("UNet"):
        return "unet"
    return "transformer" if "Transformer" in name and name.endswith("Model") else None
