"""Packed files: an adapter or a task vector whose tensors are packed, and their way back.

A packed file is a safetensors file of packed tensors (U8) under the names of the original ones,
with the original metadata; its own are a JSON object of the entry ``mergebench``. Unpacked, it is
the original file, tensor by tensor and when they are read, so all that opens it opens packed ones.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import xxhash

from mergebench.adapters_zoo.adapter import FILE_KEY, parse_object, saved_kind
from mergebench.adapters_zoo.packing import Block, Packed, open_packed
from mergebench.adapters_zoo.planes import BLOCK, damaged
from mergebench.compute.machine import cores
from mergebench.core.errors import FormatError
from mergebench.core.tensor import DTYPES, Array, Tensor, nbytes, size_of

VERSION = 1
KIND = "packed"
#: What names of packed files end in.
SUFFIX = ".mbz.safetensors"
_KEPT = 1 << 20


@dataclass(eq=False)
class Cache:
    """Blocks that were unpacked last, of all tensors of a file; for any thread.

    Up to 1 MiB of them, or one for each core: a tile that is read is often a part of a block.
    """

    blocks: OrderedDict[tuple[str, int], Block] = field(default_factory=OrderedDict)
    held: int = 0
    lock: Lock = field(default_factory=Lock)

    def get(self, packed: Packed, number: int) -> Block:
        """A block, unpacked if it is not kept."""
        key = packed.where, number
        with self.lock:
            if (found := self.blocks.get(key)) is not None:
                self.blocks.move_to_end(key)
                return found
        made = packed.block(number)
        with self.lock:
            if key not in self.blocks:
                self.blocks[key] = made
                self.held += made.nbytes
            while self.held > _KEPT and len(self.blocks) > cores():
                self.held -= self.blocks.popitem(last=False)[1].nbytes
        return made


@dataclass(frozen=True, eq=False)
class Unpacked:
    """A packed tensor as the tensor it stands for."""

    packed: Packed
    cache: Cache

    @property
    def dtype(self) -> str:
        """Dtype of the entries."""
        return self.packed.head.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original."""
        return self.packed.head.shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor; only their blocks are unpacked.

        Raises
        ------
        FormatError
            If one of the blocks is damaged.
        IndexError, ValueError
            If the range or ``out`` does not fit: a mistake of the caller.
        """
        if not 0 <= start <= stop <= self.packed.head.size:
            raise IndexError(f"entries {start}:{stop} of {self.packed.head.size}")
        dtype = DTYPES[self.dtype]
        if out is None:
            entries: Array = np.empty(stop - start, dtype)
        else:
            entries = out[: (stop - start) * dtype.itemsize].view(dtype)
        # Kernels look at no length.
        if entries.shape != (stop - start,):
            raise ValueError(f"out holds {entries.size} entries, {stop - start} are needed")
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            origin = number * BLOCK
            low, high = max(start, origin), min(stop, origin + BLOCK)
            block = self.cache.get(self.packed, number)
            block.read(low - origin, high - origin, entries[low - start : high - start])
        return entries


@dataclass(frozen=True, eq=False)
class PackedFile:
    """A packed file, opened: heads and tables are checked, no block has been read.

    Attributes
    ----------
    tensors : mapping of str to Unpacked
        As those of the original file.
    metadata : mapping of str to str
        Of the original file.
    made : mapping
        How it was packed and what that cost: JSON values that the packer left.
    """

    tensors: Mapping[str, Unpacked]
    metadata: Mapping[str, str]
    made: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensors."""
        return sum(tensor.packed.nbytes for tensor in self.tensors.values())

    @property
    def unpacked_nbytes(self) -> int:
        """Bytes of the tensors that they unpack to."""
        return sum(nbytes(tensor.dtype, tensor.shape) for tensor in self.tensors.values())

    @property
    def codecs(self) -> dict[str, int]:
        """How many entries each codec holds."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            head = tensor.packed.head
            found[head.codec] = found.get(head.codec, 0) + head.size
        return found


def is_packed(metadata: Mapping[str, str]) -> bool:
    """Whether metadata are those of a packed file."""
    return saved_kind(metadata) == KIND


def packed_metadata(
    metadata: Mapping[str, str], names: Iterable[str], made: Mapping[str, Any]
) -> dict[str, str]:
    """``__metadata__`` of a packed file.

    Parameters
    ----------
    metadata : mapping of str to str
        Of the original file.
    names : iterable of str
        Of its tensors.
    made : mapping
        How it was packed: JSON values.
    """
    others = {key: value for key, value in metadata.items() if key != FILE_KEY}
    about = {"kind": KIND, "version": VERSION, "of": metadata.get(FILE_KEY), "made": dict(made)}
    about["seal"] = _seal(others, names, about)
    return {**others, FILE_KEY: json.dumps(about, sort_keys=True)}


def _seal(others: Mapping[str, str], names: Iterable[str], about: Mapping[str, Any]) -> str:
    """A digest of all that the header says and no tensor knows."""
    said = {key: value for key, value in about.items() if key != "seal"}
    text = json.dumps([dict(others), sorted(names), said], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def open_packed_file(
    label: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> PackedFile:
    """The tensors and metadata that a packed file stands for.

    Parameters
    ----------
    label : str
        Named in messages.
    tensors, metadata
        As the safetensors file has them.

    Raises
    ------
    FormatError
        If the file is damaged, or of a version that is not known.
    """
    about = parse_object(label, FILE_KEY, metadata[FILE_KEY])
    if about.get("version") != VERSION:
        raise FormatError(
            f"{label}: packed file of an unknown version",
            got=repr(about.get("version")),
            expected=str(VERSION),
            fix="open it with the mergebench that wrote it, or a newer one",
        )
    others = {key: value for key, value in metadata.items() if key != FILE_KEY}
    of, made = about.get("of"), about.get("made")
    if about.get("seal") != _seal(others, tensors, about):
        raise damaged(label, "does not have the checksum of its metadata")
    if not (of is None or isinstance(of, str)) or not isinstance(made, dict):
        raise damaged(label, "does not say what it was packed from")
    if of is not None:
        others[FILE_KEY] = of
    cache = Cache()
    opened = {name: Unpacked(open_packed(label, name, t), cache) for name, t in tensors.items()}
    _check_sizes(label, opened, saved_kind(others) is None)
    return PackedFile(opened, others, made)


# Factors are held in memory whole; nothing that packs well by training is packed better.
_TIMES, _FREE = 1 << 12, 256 << 20


def _check_sizes(label: str, tensors: Mapping[str, Unpacked], factors: bool) -> None:
    """Refuse an adapter that would unpack to a multiple of its size that none has."""
    whole = sum(nbytes(tensor.dtype, tensor.shape) for tensor in tensors.values())
    held = sum(size_of(tensor.packed.blob.shape) for tensor in tensors.values())
    if factors and whole > _TIMES * held + _FREE:
        raise FormatError(
            f"{label}: its {held} bytes would unpack to {whole}",
            expected=f"at most {_TIMES} times as many, and 256 MiB",
            fix="do not use this file unless you trust it",
        )
