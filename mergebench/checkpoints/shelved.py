"""Files of weights on a shelf: cut into objects that are kept once, however many files have them.

A file ``x.safetensors`` stands there as ``x.safetensors.shelf``, a list of objects which, one after
another, are its bytes. The header is the first one; every large tensor is one of its own, so that
what adapters share, such as frozen projections, is stored once. Reading needs no copy: a tensor
lies within one object.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

from mergebench.checkpoints.containers import SHELVED, Container
from mergebench.checkpoints.descriptors import Handle, cannot
from mergebench.checkpoints.documents import read_bounded
from mergebench.checkpoints.header import parse_header, parse_strict
from mergebench.checkpoints.reader import FileTensor
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.tensor import nbytes

#: Where objects lie, and where entries do, below a shelf.
OBJECTS, ENTRIES = "objects", "adapters"
VERSION = 1
#: Tensors from this size on are objects of their own; smaller ones stand together in one.
SMALL = 1 << 14
_DIGEST = re.compile("[0-9a-f]{64}")
_FIX = "add it to the shelf again"


@dataclass(frozen=True)
class Piece:
    """An object: BLAKE2b-256 of its bytes, 64 hexadecimal digits, and their number."""

    digest: str
    size: int


@dataclass(frozen=True)
class Shelved:
    """A file as a shelf has it.

    Attributes
    ----------
    path : Path
        Of the list.
    file : str
        The name of the file.
    pieces : tuple of Piece
        In the order of its bytes.
    """

    path: Path
    file: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(each.size for each in self.pieces)

    def place(self, piece: Piece) -> Path:
        """Where an object lies."""
        return object_place(self.path.absolute().parent.parent.parent, piece.digest)

    def to_bytes(self) -> bytes:
        """The list, as it is stored."""
        data = {
            "shelf": VERSION,
            "file": self.file,
            "objects": [[each.digest, each.size] for each in self.pieces],
        }
        return (json.dumps(data, indent=1) + "\n").encode()


def object_place(shelf: Path, digest: str) -> Path:
    """Where an object of a shelf lies."""
    return shelf / OBJECTS / digest[:2] / digest[2:]


def digest_of(data: bytes | memoryview) -> str:
    """The name of an object with these bytes."""
    return blake2b(data, digest_size=32).hexdigest()


def cuts(head: int, tensors: Sequence[FileTensor], size: int) -> list[int]:
    """Where a file is cut: bytes at which an object begins, and the end.

    Parameters
    ----------
    head : int
        Bytes before the data.
    tensors : sequence of FileTensor
        In the order of their bytes.
    size : int
        Bytes of the file.
    """
    found = [0, head]
    for tensor in tensors:
        stop = tensor.offset + nbytes(tensor.dtype, tensor.shape)
        if stop - tensor.offset >= SMALL:
            found += [tensor.offset, stop]
    return sorted({*found, size})


def read_shelved(path: Path) -> Shelved:
    """Read the list of a file's objects.

    Raises
    ------
    FormatError
        If it is no such list.
    MergebenchError
        If the system cannot read it.
    """
    try:
        raw = read_bounded(path)
    except OSError as error:
        raise cannot("read", path, error) from error
    try:
        data = parse_strict(raw.decode("utf-8"))
    except ValueError as error:
        raise _bad(path, str(error)) from None
    if not isinstance(data, dict) or data.get("shelf") != VERSION:
        raise _bad(path, "no list of this version")
    file, listed = data.get("file"), data.get("objects")
    if f"{file}{SHELVED}" != path.name or not isinstance(listed, list) or not listed:
        raise _bad(path, f"the file {file!r}")
    return Shelved(path, str(file), tuple(_piece(path, each) for each in listed))


def _piece(path: Path, data: Any) -> Piece:
    # Digests become paths, so they are nothing but digits.
    sound = isinstance(data, list) and len(data) == 2 and isinstance(data[0], str)
    if not sound or not _DIGEST.fullmatch(data[0]) or type(data[1]) is not int or data[1] < 0:
        raise _bad(path, repr(data)[:100])
    return Piece(data[0], data[1])


def _bad(path: Path, got: str) -> FormatError:
    return FormatError(f"{path}: is no sound list of objects", got=got, fix=_FIX)


def open_shelved(path: Path) -> Container:
    """Open a file on a shelf; its header is read, and no tensor.

    Raises
    ------
    FormatError
        If the list or an object is damaged.
    MergebenchError
        If an object is missing.
    """
    shelved = read_shelved(path)
    handles = [_handle(shelved, each) for each in shelved.pieces]
    head = bytearray(shelved.pieces[0].size)
    handles[0].read_at(memoryview(head), 0)
    if digest_of(bytes(head)) != shelved.pieces[0].digest or len(head) < 8:
        raise FormatError(f"{path}: its header is damaged", fix=_FIX)
    metadata, entries = parse_header(bytes(head[8:]), str(path), shelved.size - len(head))
    starts = list(accumulate((each.size for each in shelved.pieces), initial=0))
    tensors = {}
    for entry in entries:
        start, stop = len(head) + entry.start, len(head) + entry.stop
        at = min(bisect_right(starts, start) - 1, len(handles) - 1)
        if stop > starts[at + 1]:
            raise FormatError(f"{path}: tensor {entry.name!r} lies in two objects", fix=_FIX)
        tensors[entry.name] = FileTensor(
            entry.name, entry.dtype, entry.shape, start - starts[at], handles[at]
        )
    return Container(
        path=path,
        tensors=tensors,
        header_hash=blake2b(bytes(head[8:]), digest_size=16).hexdigest(),
        size=shelved.size,
        mtime_ns=0,
        metadata=metadata,
    )


def _handle(shelved: Shelved, piece: Piece) -> Handle:
    place = shelved.place(piece)
    try:
        size = place.stat().st_size
    except OSError as error:
        raise MergebenchError(
            f"{shelved.path}: an object of it is missing on the shelf",
            got=f"{place}: {error.strerror}",
            fix=_FIX,
        ) from None
    if size != piece.size:
        raise FormatError(
            f"{shelved.path}: an object of it is damaged",
            expected=f"{piece.size} bytes",
            got=f"{size} in {place}",
            fix=_FIX,
        )
    return Handle(place)
