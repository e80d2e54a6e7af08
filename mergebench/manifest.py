"""Provenance: what an output was made of, and by what, and the digests of what was written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from mergebench.checkpoints.placement import Layout
from mergebench.core.plain import parse_json
from mergebench.core.version import own_version

#: File names inside an output folder.
MANIFEST, RECIPE, CARD = "mergebench_manifest.json", "mergebench_recipe.yaml", "README.md"
#: Keys of ``__metadata__`` in single files: the manifest, and the digests of what was written.
KEY, DIGESTS = "mergebench", "mergebench_digests"

_LENGTH = 32
_OWN = re.compile(rb'"digest": "([0-9a-f]{32})"\n\}\n\Z')


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
        "mergebench": own_version(),
        "recipe": dict(recipe),
        "inputs": [dict(each) for each in inputs],
        "notes": list(notes),
    }


def as_metadata(data: Mapping[str, Any]) -> dict[str, str]:
    """The manifest as it is stored in the header of a single file.

    Modification times are left out, so that copies of the inputs give the same bytes; the digests
    of tensors stand in an entry of their own.
    """
    inputs = [
        {key: value for key, value in each.items() if key != "files"} for each in data["inputs"]
    ]
    return {KEY: json.dumps({**data, "inputs": inputs, "outputs": DIGESTS}, sort_keys=True)}


def with_outputs(
    data: Mapping[str, Any],
    digests: Mapping[str, str],
    layout: Layout,
    beside: Mapping[str, str],
) -> bytes:
    """The manifest file of a finished output; all digests are xxh3-128 of bytes.

    Parameters
    ----------
    data : mapping
        As :func:`manifest` gives it.
    digests : mapping of tensor name to digest
    layout : Layout
        Gives files with size and digest of their header, and dtype, shape and file of tensors.
    beside : mapping of file name to digest
        Of the files beside the weights, the index included.
    """
    whole = {
        **data,
        "outputs": dict(digests),
        "tensors": {
            name: {
                "dtype": place.spec.dtype,
                "shape": list(place.spec.shape),
                "file": place.file,
            }
            for name, place in layout.places.items()
        },
        "files": {
            file.name: {"bytes": file.size, "header": xxhash.xxh3_128_hexdigest(file.head)}
            for file in layout.files
        },
        "beside": dict(sorted(beside.items())),
        "digest": no_digests(0),
    }
    text = (json.dumps(whole, indent=1) + "\n").encode()
    # The last digest is that of the file itself, with zeros in its own place.
    end = text.rindex(b"0" * _LENGTH)
    return text[:end] + xxhash.xxh3_128_hexdigest(text).encode() + text[end + _LENGTH :]


def is_intact(text: bytes) -> bool:
    """Whether a manifest file has the digest that it states of itself."""
    found = _OWN.search(text)
    if found is None:
        return False
    start, stop = found.span(1)
    blank = text[:start] + no_digests(0).encode() + text[stop:]
    return xxhash.xxh3_128_hexdigest(blank).encode() == found[1]


def no_digests(count: int) -> str:
    """What stands in the header of a single file until the digests of its tensors are known."""
    return "0" * _LENGTH * (count + 1)


def sealed(layout: Layout, digests: Mapping[str, str]) -> str:
    """The digests in the header of a single file: tensors in the order of their bytes.

    The last one is that of the file's bytes before the data, with zeros in its own place.
    """
    (file,) = layout.files
    start, stop = file.late
    body = "".join(digests[name] for name in layout.places)
    blank = file.head[:start] + body.encode() + no_digests(0).encode() + file.head[stop:]
    return body + xxhash.xxh3_128_hexdigest(blank)


def is_sealed(head: bytes, metadata: Mapping[str, str]) -> bool:
    """Whether the bytes before the data of a single file have the digest stated there."""
    own = metadata.get(DIGESTS, "")[-_LENGTH:].encode()
    if len(own) < _LENGTH or head.count(own) != 1:
        return False
    return xxhash.xxh3_128_hexdigest(head.replace(own, no_digests(0).encode())).encode() == own


def digests_of(metadata: Mapping[str, str], names: Sequence[str]) -> dict[str, str] | None:
    """The digests in the header of a single file; ``None`` where they are not complete.

    Parameters
    ----------
    metadata : mapping of str to str
    names : sequence of str
        Tensors in the order of their bytes.
    """
    text = metadata.get(DIGESTS, "")
    if len(text) != _LENGTH * (len(names) + 1) or text == no_digests(len(names)):
        return None
    return {name: text[_LENGTH * i : _LENGTH * (i + 1)] for i, name in enumerate(names)}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The manifest in a file's metadata, if there is one."""
    try:
        data = parse_json(metadata[KEY])
    except (KeyError, ValueError):
        return None
    return data if isinstance(data, dict) else None
