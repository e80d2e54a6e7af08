"""Task vectors saved by mergebench: one tensor per displacement, nothing to compute."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from mergebench.adapters_zoo.adapter import (
    FILE_KEY,
    KINDS,
    AdapterSource,
    Kind,
    ReadOptions,
    parse_object,
    saved_kind,
)
from mergebench.core.delta import Delta, Dense, Replacement
from mergebench.core.errors import FormatError
from mergebench.core.tensor import FLOATING

VERSION = 1


def delta_metadata(
    base_identity: Mapping[str, Any] | None, *, replaced: Collection[str] = ()
) -> dict[str, str]:
    """``__metadata__`` of a saved task vector.

    Parameters
    ----------
    base_identity : mapping or None
        What identifies the base: anything JSON can hold.
    replaced : collection of str, default none
        Tensors that hold new values instead of differences.
    """
    about = {
        "kind": "delta",
        "version": VERSION,
        "base": None if base_identity is None else dict(base_identity),
        "replaced": sorted(replaced),
    }
    return {"format": "pt", FILE_KEY: json.dumps(about, sort_keys=True)}


def _detect(source: AdapterSource) -> frozenset[str]:
    return frozenset(source.tensors) if saved_kind(source.metadata) == "delta" else frozenset()


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    about = parse_object(source.label, FILE_KEY, source.metadata[FILE_KEY])
    if about.get("version") != VERSION:
        raise FormatError(
            f"{source.label}: saved task vector of an unknown version",
            got=repr(about.get("version")),
            expected=str(VERSION),
            fix="open it with the mergebench that wrote it, or a newer one",
        )
    listed = about.get("replaced", [])
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise FormatError(
            f"{source.label}: `replaced` in its metadata",
            expected="a list of names",
            got=repr(listed),
        )
    replaced = frozenset(listed)
    if missing := sorted(replaced - set(source.tensors)):
        raise FormatError(f"{source.label}: {missing[0]} is listed as replaced but is not stored")
    deltas: dict[str, Delta] = {}
    for name, tensor in source.tensors.items():
        if name in replaced:
            deltas[name] = Replacement(tensor)
        elif tensor.dtype in FLOATING:
            deltas[name] = Dense(tensor)
        else:
            raise FormatError(
                f"{source.label}: {name} is no difference",
                got=tensor.dtype,
                expected="a floating-point dtype",
            )
    return deltas


KINDS.add(
    "delta",
    Kind(
        name="delta",
        formula="ΔW = the stored tensor",
        detect=_detect,
        read=_read,
        notes="A safetensors file whose metadata hold the base's identity; lossless.",
    ),
)
