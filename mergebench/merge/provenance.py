"""What an output says of where it comes from: inputs, repositories, library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergebench.adapters_zoo.pack import PackedLayout
from mergebench.checkpoints.hub import parse_hub
from mergebench.core.schedule import to_plain
from mergebench.merge.collected import Collected, named
from mergebench.sources import Source, pulled_from


def inputs_of(
    models: Sequence[Source],
    weights: Sequence[Any],
    base: Source | None,
    collected: Sequence[Collected | None] = (),
) -> list[dict[str, Any]]:
    """What a manifest says of the inputs, the base first."""
    found: list[dict[str, Any]] = []
    files = [*([None] if base else []), *(collected or [None] * len(models))]
    given = [*([(base, None)] if base else []), *zip(models, weights, strict=True)]
    for (source, weight), file in zip(given, files, strict=True):
        each: dict[str, Any] = {
            "role": "base" if weight is None else "model",
            "path": source.label,
        }
        if weight is not None:
            each["weight"] = to_plain(weight)
        each["fingerprint"] = source.fingerprint
        if (pulled := pulled_from(source)) is not None:
            each["origin"] = pulled
        if file is not None:
            each["statistics"] = named(file)
        each["files"] = [dict(one) for one in source.identity]
        found.append(each)
    return found


def origins_of(models: Sequence[Source], base: Source | None) -> list[str | None]:
    """Where the inputs' own configs say they come from; paths here are nobody else's business."""
    found: list[Any] = []
    for source in [*([base] if base else []), *models]:
        found += [parse_hub(reference).repo for reference in source.revisions]
        found.append((pulled_from(source) or {}).get("repo"))
        found.append(source.config.get("base_model_name_or_path"))
        if source.checkpoint is not None and source.checkpoint.config is not None:
            found.append(source.checkpoint.config.get("_name_or_path"))
    return [name if isinstance(name, str) else None for name in found]


def library_of(form: str, reference: Source | None, packed: PackedLayout | None) -> str | None:
    """The library that loads an output, where one is known."""
    if packed is not None:
        return "peft" if packed.config else "diffusers"
    known = reference.checkpoint.config if reference and reference.checkpoint else None
    return "transformers" if form == "model" and known and "model_type" in known else None
