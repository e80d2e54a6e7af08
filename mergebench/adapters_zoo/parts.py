"""Components of a pipeline, as adapters name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from mergebench.core.errors import MismatchError, ParameterError, did_you_mean

_T = TypeVar("_T")
_UNET = r"(lora|lycoris)_(unet|transformer)_|(unet|transformer|(model\.)?diffusion_model)\."

#: Component -> how names of adapter tensors that belong to it begin.
PARTS: Mapping[str, re.Pattern[str]] = {
    "unet": re.compile(_UNET),
    "transformer": re.compile(_UNET),
    "text_encoder": re.compile(r"(lora|lycoris)_te1?_|text_encoder\.|text_encoders\.clip_l\."),
    "text_encoder_2": re.compile(
        r"(lora|lycoris)_te2_|text_encoder_2\.|text_encoders\.(clip_g|t5xxl)\."
    ),
    "text_encoder_3": re.compile(r"(lora|lycoris)_te3_|text_encoder_3\."),
}


def only(label: str, tensors: Mapping[str, _T], part: str) -> dict[str, _T]:
    """The tensors of an adapter that belong to one component.

    Raises
    ------
    ParameterError
        For an unknown component.
    MismatchError
        If the adapter has no tensor of it.
    """
    if part not in PARTS:
        raise ParameterError(f"part: {part!r}", fix=did_you_mean(part, PARTS))
    found = {name: tensor for name, tensor in tensors.items() if PARTS[part].match(name)}
    if not found:
        raise MismatchError(
            f"{label}: holds nothing for the {part}", got=", ".join(sorted(tensors)[:3])
        )
    return found


def part_of(name: str) -> str | None:
    """The component that an adapter's tensor says it belongs to, None where it says nothing."""
    return next((part for part, form in PARTS.items() if form.match(name)), None)
