"""Provenance: what an output was made of, and by what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

#: File names inside an output folder.
MANIFEST, RECIPE, CARD = "mergebench_manifest.json", "mergebench_recipe.yaml", "README.md"
#: Key of ``__metadata__`` in single files.
KEY = "mergebench"


def manifest(
    recipe: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    kind: str,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What is known before the merge.

    Parameters
    ----------
    recipe : mapping
        With every parameter at its expanded value.
    inputs : sequence of mappings
        Role, path, fingerprint and files of every input.
    kind : model, lora or delta
    notes : sequence of str
        What the plan had to say.
    """
    return {
        "version": 1,
        "kind": kind,
        "mergebench": version("mergebench"),
        "recipe": dict(recipe),
        "inputs": [dict(each) for each in inputs],
        "notes": list(notes),
    }


def as_metadata(data: Mapping[str, Any]) -> dict[str, str]:
    """The manifest as it is stored in the header of a single file.

    Modification times are left out, so that copies of the inputs give the same bytes.
    """
    inputs = [
        {key: value for key, value in each.items() if key != "files"} for each in data["inputs"]
    ]
    return {KEY: json.dumps({**data, "inputs": inputs}, sort_keys=True)}


def with_outputs(data: Mapping[str, Any], digests: Mapping[str, str]) -> bytes:
    """The manifest file of a finished output: digests (xxh3-128) of every tensor added."""
    return (json.dumps({**data, "outputs": dict(digests)}, indent=1) + "\n").encode()


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The manifest in a file's metadata, if there is one."""
    try:
        data = json.loads(metadata[KEY])
    except (KeyError, ValueError):
        return None
    return data if isinstance(data, dict) else None
