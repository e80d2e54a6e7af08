"""The header of a GGUF file: fields and tensor descriptions, vocabularies passed over.

The ``gguf`` package reads headers too, but makes several objects for every token of a vocabulary,
which takes seconds, and reads on beyond the end of a damaged file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergebench.checkpoints.descriptors import Handle

# Value types of the format: struct codes of the scalars, and the two that are none.
_SCALARS: Mapping[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TEXT, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_BLOCK = 1 << 20
# numpy and torch hold no more.
_MAX_DIMENSIONS = 64
_ALIGNMENT = 32


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it.

    Attributes
    ----------
    name : str
        Its name.
    kind : int
        Number of its ``GGMLQuantizationType``.
    shape : tuple of int
        Row-major, as in torch: the file counts from the innermost dimension.
    offset : int
        Byte of the file at which it starts.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """Fields that are scalars or texts; tensors; a BLAKE2b-128 of the header's bytes, in hex."""

    fields: Mapping[str, Any]
    entries: tuple[Entry, ...]
    digest: str


class SwappedError(ValueError):
    """The file is of another byte order than the format's usual one."""


def parse_header(handle: Handle, size: int) -> Header:
    """Read the header of a file that starts with ``GGUF``.

    Parameters
    ----------
    handle : Handle
        The file.
    size : int
        Its bytes.

    Raises
    ------
    ValueError
        For anything that contradicts the format, the end of the file included.
    """
    cursor = _Cursor(handle, size)
    cursor.skip(4)
    version = cursor.number("<I")
    if version & 0xFFFF == 0:
        raise SwappedError("big-endian")
    if version not in _VERSIONS:
        raise ValueError(f"version {version} of the format, known are {_VERSIONS}")
    tensors, count = cursor.number("<Q"), cursor.number("<Q")
    fields: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text()
        if name in fields:
            raise ValueError(f"the field {name!r} twice")
        fields[name] = cursor.value(cursor.number("<I"))
    found: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name = cursor.text()
        if name in found:
            raise ValueError(f"the tensor {name!r} twice")
        dimensions = cursor.number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{dimensions} dimensions of {name!r}")
        shape = [cursor.number("<Q") for _ in range(dimensions)]
        found[name] = cursor.number("<I"), tuple(reversed(shape)), cursor.number("<Q")
    step = fields.get("general.alignment", _ALIGNMENT)
    if type(step) is not int or step < 1:
        raise ValueError(f"an alignment of {step!r}")
    start = -(-cursor.at // step) * step
    return Header(
        fields={name: value for name, value in fields.items() if value is not None},
        entries=tuple(
            Entry(name, kind, shape, start + offset)
            for name, (kind, shape, offset) in found.items()
        ),
        digest=hashlib.blake2b(cursor.raw[: cursor.at], digest_size=16).hexdigest(),
    )


class _Cursor:
    """The bytes read so far, and a place in them."""

    def __init__(self, handle: Handle, size: int) -> None:
        self.handle, self.size = handle, size
        self.raw = bytearray()
        self.at = 0

    def skip(self, count: int) -> int:
        """Where the next bytes begin; they are there and passed over."""
        start, stop = self.at, self.at + count
        if stop > self.size:
            raise ValueError(f"byte {stop} is needed, the file has {self.size}")
        if stop > len(self.raw):
            block = bytearray(min(max(_BLOCK, stop - len(self.raw)), self.size - len(self.raw)))
            if self.handle.read_at(memoryview(block), len(self.raw)) < len(block):
                raise ValueError("the file was cut while it was read")
            self.raw += block
        self.at = stop
        return start

    def number(self, code: str) -> Any:
        start = self.skip(struct.calcsize(code))
        return struct.unpack_from(code, self.raw, start)[0]

    def text(self) -> str:
        length = self.number("<Q")
        start = self.skip(length)
        return self.raw[start : start + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A scalar or a text; ``None`` for an array, which is passed over."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_code(kind))
        item, count = self.number("<I"), self.number("<Q")
        if item == _TEXT:
            for _ in range(count):
                self.skip(self.number("<Q"))
        elif item == _ARRAY:
            for _ in range(count):
                self.value(_ARRAY)
        else:
            self.skip(count * struct.calcsize(_code(item)))
        return None


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"unknown type of value {kind}")
    return _SCALARS[kind]
