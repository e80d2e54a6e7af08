"""Where every byte of an output will lie, decided before the first one is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

from mergebench.checkpoints.header import MAX_HEADER
from mergebench.core.errors import FormatError, MergebenchError, ParameterError, did_you_mean
from mergebench.core.tensor import DTYPES, nbytes

#: What torch-based loaders look for in ``__metadata__``.
PT: Mapping[str, str] = MappingProxyType({"format": "pt"})
# The order of the safetensors library inside a file; names decide among tensors of one dtype.
_ORDER = (
    "U64",
    "I64",
    "F64",
    "C64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)
_RANK = {dtype: rank for rank, dtype in enumerate(_ORDER)}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written: ``dtype`` is a key of ``DTYPES``, ``shape`` is ``()`` if 0-d."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: ``offset`` is the byte of the file ``file`` at which it starts."""

    spec: TensorSpec
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.spec.nbytes


@dataclass(frozen=True)
class PlannedFile:
    """One file.

    Attributes
    ----------
    name : str
    head : bytes
        Its first bytes: length, header, padding.
    size : int
        Bytes of the whole file.
    late : tuple of int
        First byte, and the one after the last, of what is known only when all data are; empty
        where that is nothing.
    """

    name: str
    head: bytes = field(repr=False)
    size: int
    late: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Layout:
    """All files of an output.

    Attributes
    ----------
    files : tuple of PlannedFile
        In shard order.
    places : mapping of str to Place
        By tensor name: files in order, tensors of a file in the order of their bytes.
    index : str or None
        Name of the index; ``None`` where there is one file.
    metadata : mapping of str to str, or None
        ``__metadata__`` of every file.
    """

    files: tuple[PlannedFile, ...]
    places: Mapping[str, Place] = field(repr=False)
    index: str | None = None
    metadata: Mapping[str, str] | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, headers included and the index not."""
        return sum(file.size for file in self.files)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors; ``total_size`` of the index."""
        return sum(place.nbytes for place in self.places.values())

    @property
    def parameters(self) -> int:
        """Entries of all tensors; ``total_parameters`` of the index."""
        return sum(prod(place.spec.shape) for place in self.places.values())

    def index_bytes(self) -> bytes:
        """Content of the index, as transformers writes it."""
        document = {
            "metadata": {
                "total_parameters": self.parameters,
                "total_size": self.tensor_bytes,
            },
            "weight_map": {name: self.places[name].file for name in sorted(self.places)},
        }
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()

    def to_json(self) -> dict[str, Any]:
        """The layout as plain JSON values; equal layouts give equal values."""
        return {
            "index": self.index,
            "metadata": None if self.metadata is None else dict(self.metadata),
            "files": [{"name": file.name, "bytes": file.size} for file in self.files],
            "tensors": [
                {
                    "name": name,
                    "dtype": place.spec.dtype,
                    "shape": list(place.spec.shape),
                    "file": place.file,
                    "offset": place.offset,
                }
                for name, place in self.places.items()
            ],
            "total_bytes": self.total_bytes,
        }


def plan_layout(
    specs: Iterable[TensorSpec],
    stem: str = "model",
    shard_size: int | None = None,
    *,
    metadata: Mapping[str, str] | None = PT,
    late: str | None = None,
) -> Layout:
    """Place tensors in one file, or in shards filled in the given order.

    A tensor that does not fit into the current shard starts a new one; one that is larger than
    ``shard_size`` gets a shard of its own. Inside a file the order is that of the safetensors
    library (dtypes by falling alignment, then names), so one file has the very bytes that
    ``safetensors.numpy.save_file`` writes, given at most one metadata entry: the library shuffles
    several, here they are sorted.

    Parameters
    ----------
    specs : iterable of TensorSpec
        In the order of the base.
    stem : str, default "model"
        ``<stem>.safetensors``, or ``<stem>-00001-of-0000N.safetensors`` and
        ``<stem>.safetensors.index.json``.
    shard_size : int or None, default None
        Bytes of tensors per shard, at least 1; ``None`` for one file.
    metadata : mapping of str to str or None, default ``{"format": "pt"}``
        ``__metadata__`` of every file; ``None`` for none.
    late : str, optional
        Name of a metadata entry whose value, a plain text of the same length, is written last.

    Raises
    ------
    MergebenchError
        For a repeated or impossible tensor name, an unknown dtype, a header above 100 MB, or a
        ``shard_size`` below 1.
    """
    ordered = tuple(specs)
    _check_specs(ordered)
    if shard_size is not None and shard_size < 1:
        raise ParameterError("shard_size must be at least 1 byte", got=f"{shard_size}")
    shards = _split(ordered, shard_size)
    count = len(shards)
    files, places = [], {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
        file, placed = _plan_file(f"{stem}{part}.safetensors", shard, metadata, late)
        files.append(file)
        places.update({place.spec.name: place for place in placed})
    index = f"{stem}.safetensors.index.json" if count > 1 else None
    return Layout(tuple(files), places, index, metadata)


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise FormatError(f"tensor {spec.name!r} would be written twice")
        seen.add(spec.name)
        if spec.name == "__metadata__":
            raise FormatError("a safetensors file cannot hold a tensor named '__metadata__'")
        if spec.dtype not in DTYPES:
            raise FormatError(
                f"tensor {spec.name!r} has an unknown dtype",
                got=repr(spec.dtype),
                fix=did_you_mean(spec.dtype, DTYPES),
            )


def _split(specs: Sequence[TensorSpec], limit: int | None) -> list[list[TensorSpec]]:
    if limit is None:
        return [list(specs)]
    shards: list[list[TensorSpec]] = []
    filling: list[TensorSpec] = []
    filled = 0
    for spec in specs:
        if spec.nbytes > limit:
            shards.append([spec])
            continue
        if filled + spec.nbytes > limit:
            shards.append(filling)
            filling, filled = [], 0
        filling.append(spec)
        filled += spec.nbytes
    if filling or not shards:
        shards.append(filling)
    return shards


def _plan_file(
    name: str,
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str] | None,
    late: str | None,
) -> tuple[PlannedFile, list[Place]]:
    ordered = sorted(specs, key=lambda spec: (_RANK[spec.dtype], spec.name))
    document: dict[str, Any] = {}
    if metadata is not None:
        document["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    for spec in ordered:
        document[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    try:
        header = text.encode()
    except UnicodeEncodeError:
        raise FormatError(f"{name}: a tensor name or metadata is not valid Unicode") from None
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER:
        raise MergebenchError(
            f"{name}: the header is larger than readers accept",
            expected=f"at most {MAX_HEADER} bytes",
            got=f"{len(header)}",
            fix="write smaller shards",
        )
    head = len(header).to_bytes(8, "little") + header
    places, offset = [], len(head)
    for spec in ordered:
        places.append(Place(spec, name, offset))
        offset += spec.nbytes
    return PlannedFile(name, head, offset, _span_of(head, late, metadata)), places


def _span_of(head: bytes, entry: str | None, metadata: Mapping[str, str] | None) -> tuple[int, int]:
    """Where the value of a metadata entry stands in a header."""
    if entry is None or metadata is None:
        return 0, 0
    # Quotes inside of other values are escaped, and the metadata come first.
    key = json.dumps(entry, ensure_ascii=False).encode() + b':"'
    start = head.index(key) + len(key)
    return start, start + len(metadata[entry].encode())
