"""Sparse differences: a few entries of each tensor, and tensors stored whole."""

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
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.adapters_zoo.scattered import checked_shape, scattered
from mergebench.core.delta import Delta, Dense, Replacement
from mergebench.core.errors import FormatError, MismatchError

VERSION = 1
INDICES, VALUES = ".sparse_indices", ".sparse_values"


def sparse_metadata(
    shapes: Mapping[str, tuple[int, ...]],
    base_identity: Mapping[str, Any] | None,
    *,
    replaced: Collection[str] = (),
) -> dict[str, str]:
    """``__metadata__`` of a file of sparse differences.

    Parameters
    ----------
    shapes : mapping of tensor name to shape
        Of every tensor of which entries are stored.
    base_identity : mapping or None
        What identifies the base: anything JSON can hold.
    replaced : collection of str, default none
        Tensors stored whole, as new values.
    """
    about = {
        "kind": "sparse",
        "version": VERSION,
        "base": None if base_identity is None else dict(base_identity),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "replaced": sorted(replaced),
    }
    return {"format": "pt", FILE_KEY: json.dumps(about, sort_keys=True)}


def _detect(source: AdapterSource) -> frozenset[str]:
    return frozenset(source.tensors) if saved_kind(source.metadata) == "sparse" else frozenset()


def _about(source: AdapterSource) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of sparse tensors, and names of those stored whole; every tensor is accounted for."""
    about = parse_object(source.label, FILE_KEY, source.metadata[FILE_KEY])
    if about.get("version") != VERSION:
        raise FormatError(
            f"{source.label}: sparse difference of an unknown version",
            got=repr(about.get("version")),
            expected=str(VERSION),
            fix="open it with the mergebench that wrote it, or a newer one",
        )
    shapes, replaced = about.get("shapes"), about.get("replaced", [])
    if not isinstance(shapes, dict):
        raise FormatError(f"{source.label}: `shapes` in its metadata", expected="names and shapes")
    if not isinstance(replaced, list) or not all(isinstance(name, str) for name in replaced):
        raise FormatError(f"{source.label}: `replaced` in its metadata", expected="names")
    found = {name: checked_shape(f"{source.label}: {name}", s) for name, s in shapes.items()}
    if twice := sorted(found.keys() & set(replaced)):
        raise FormatError(
            f"{source.label}: {twice[0]} is stored both sparse and whole", expected="one of them"
        )
    named = {*replaced, *(n + end for n in found for end in (INDICES, VALUES))}
    if odd := sorted(named ^ set(source.tensors)):
        what = "is not stored" if odd[0] in named else "is in no list of its metadata"
        raise FormatError(f"{source.label}: {odd[0]} {what}")
    return found, replaced


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    shapes, replaced = _about(source)
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    deltas: dict[str, Delta] = {}
    for name, shape in shapes.items():
        target = name
        if names is not None:
            target = names.unique(source.label, name, name, names.dotted(name))
            if names.shapes[target] != shape:
                raise MismatchError(
                    f"{source.label}: {name} is a difference of another shape than the base's",
                    got=str(shape),
                    expected=str(names.shapes[target]),
                    fix="check that --base is the model that it was taken from",
                )
        tensor = scattered(
            f"{source.label}: {name}", shape, source.tensors[name + INDICES],
            source.tensors[name + VALUES],
        )  # fmt: skip
        put(source.label, deltas, target, name, Dense(tensor))
    for name in replaced:
        # Heads that were trained whole need no counterpart in the base.
        candidates = () if names is None else names.dotted(name)
        target = candidates[0] if len(candidates) == 1 else name
        put(source.label, deltas, target, name, Replacement(source.tensors[name]))
    return deltas


KINDS.add(
    "sparse",
    Kind(
        name="sparse",
        formula="ΔW[i] = value at the stored places, 0 elsewhere; or new values of a whole tensor",
        detect=_detect,
        read=_read,
        notes="Composable sparse fine-tuning, arXiv:2110.07560: files of `mergebench edit "
        "extract-sparse`, and published pytorch_diff.bin. Their heads replace those of the base; "
        "--exclude class=head composes a language with a task.",
    ),
)
