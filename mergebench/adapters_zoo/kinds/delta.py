"""Task vectors saved by mergebench: one tensor per displacement, nothing to compute."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from math import prod
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
from mergebench.adapters_zoo.scattered import checked_shape
from mergebench.core.delta import Delta, Dense, LowRank, Replacement
from mergebench.core.errors import FormatError
from mergebench.core.tensor import FLOATING

VERSION = 1
#: What follows a tensor's name in those of its factors.
LEFT, RIGHT = ".lowrank_B", ".lowrank_A"


def delta_metadata(
    base_identity: Mapping[str, Any] | None,
    *,
    replaced: Collection[str] = (),
    lowrank: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, str]:
    """``__metadata__`` of a saved task vector.

    Parameters
    ----------
    base_identity : mapping or None
        What identifies the base: anything JSON can hold.
    replaced : collection of str, default none
        Tensors that hold new values instead of differences.
    lowrank : mapping of tensor name to shape, default none
        Tensors stored as two factors, ``<name>.lowrank_B`` (rows, r) and ``<name>.lowrank_A``
        (r, columns), whose product is the displacement once reshaped.
    """
    about: dict[str, Any] = {
        "kind": "delta",
        "version": VERSION,
        "base": None if base_identity is None else dict(base_identity),
        "replaced": sorted(replaced),
    }
    if lowrank:
        about["lowrank"] = {name: list(shape) for name, shape in lowrank.items()}
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
    factors = _factors(source, about.get("lowrank", {}), deltas)
    for name, tensor in source.tensors.items():
        if name in factors:
            continue
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


def _factors(source: AdapterSource, listed: Any, deltas: dict[str, Delta]) -> frozenset[str]:
    """Add products of factors; the names of these."""
    if not isinstance(listed, dict):
        raise FormatError(f"{source.label}: `lowrank` in its metadata", expected="names and shapes")
    for name, stated in listed.items():
        shape = checked_shape(f"{source.label}: {name}", stated)
        pair = [source.tensors.get(name + end) for end in (LEFT, RIGHT)]
        B, A = pair
        if name in source.tensors or B is None or A is None:
            raise FormatError(f"{source.label}: {name} is not stored as two factors")
        fits = len(B.shape) == len(A.shape) == 2 and B.shape[1] == A.shape[0]
        floats = B.dtype in FLOATING and A.dtype in FLOATING
        if not fits or not floats or B.shape[0] * A.shape[1] != prod(shape):
            raise FormatError(
                f"{source.label}: the factors of {name} do not fit",
                expected=f"matrices whose product has the entries of {shape}",
                got=f"{B.dtype} {B.shape} and {A.dtype} {A.shape}",
            )
        deltas[name] = LowRank(B, A, 1.0, shape)
    return frozenset(name + end for name in listed for end in (LEFT, RIGHT))


KINDS.add(
    "delta",
    Kind(
        name="delta",
        formula="ΔW = the stored tensor, or the product of two factors",
        detect=_detect,
        read=_read,
        notes="A safetensors file whose metadata hold the base's identity; lossless.",
    ),
)
