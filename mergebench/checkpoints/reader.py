"""safetensors files: headers checked before anything is allocated, entries read by position.

The checks refuse whatever the safetensors library refuses, and besides: repeated keys, unknown
fields, and tensors that no array library could hold.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from mergebench.checkpoints.descriptors import Handle, cannot
from mergebench.checkpoints.header import MAX_HEADER, parse_header
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.extents import Extent, Store
from mergebench.core.tensor import DTYPES, Array

_AGAIN = "download or copy it again"
_SNIFF = 512
# What other files look like when they carry the name of a safetensors file.
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a Git-LFS pointer", "run `git lfs pull`"),
    (b"PK\x03\x04", "is a zip archive, such as a PyTorch .bin or .pt file", "convert it"),
    (b"\x80", "is a Python pickle, such as an old PyTorch file", "convert it"),
    (b"GGUF", "is a GGUF file", "use the safetensors files it was made from"),
    (b"\x89HDF", "is an HDF5 file, such as Keras weights", "convert it"),
    (b"{", "is a JSON file", "pass the weights file itself"),
)


class Readable(Store, Protocol):
    """What bytes are read through: a file here, or one elsewhere."""

    path: Path

    def read_at(self, view: memoryview, offset: int) -> int:
        """Fill a view from a byte on; how many bytes there were."""
        ...

    def read_runs(self, view: memoryview, runs: Iterable[tuple[int, int]]) -> int:
        """Fill a view from short runs ``(offset, length)``; how many bytes there were."""
        ...


@dataclass(frozen=True, eq=False)
class FileTensor:
    """One tensor of a safetensors file, read on demand.

    Attributes
    ----------
    name : str
        Its name in the file.
    dtype : str
        Stored dtype, a key of :data:`mergebench.core.tensor.DTYPES`.
    shape : tuple of int
        Shape; ``()`` for a scalar.
    offset : int
        Byte of the file at which it starts.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    handle: Readable = field(repr=False)

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor, shape ``(stop-start,)``, stored dtype.

        With ``out`` (1-D uint8, contiguous, at least as many bytes) they land there and the
        result is a view of it. Any number of threads may read at the same time.

        Raises
        ------
        FormatError
            If the file ends inside the tensor.
        MergebenchError
            If the system cannot open or read the file.
        IndexError, ValueError
            If the range or ``out`` does not fit: a mistake of the caller.
        """
        dtype = DTYPES[self.dtype]
        first, length = self._span(start, stop)
        if out is None:
            out = np.empty(length, np.uint8)
        else:
            _check_room(out, length)
        got = self.handle.read_at(out.data[:length], first)
        if got < length:
            raise self._ends(length, first, got)
        return out[:length].view(dtype)

    def read_runs(self, spans: Sequence[tuple[int, int]], out: Array) -> Array:
        """Short runs of entries side by side, as :meth:`read` gives each with ``out``."""
        runs = [self._span(start, stop) for start, stop in spans]
        length = sum(size for _, size in runs)
        _check_room(out, length)
        got = self.handle.read_runs(out.data[:length], runs)
        for first, size in runs if got < length else ():
            if got < size:
                raise self._ends(size, first, got)
            got -= size
        return out[:length].view(DTYPES[self.dtype])

    def _ends(self, length: int, first: int, got: int) -> FormatError:
        return FormatError(
            f"{self.handle.path}: the file ends inside tensor {self.name!r}",
            expected=f"{length} bytes at byte {first}",
            got=f"{got}",
            fix="it was cut while in use; " + _AGAIN,
        )

    def advise(self, start: int, stop: int, advice: str) -> None:
        """Tell the system that entries ``start:stop`` are ``"willneed"`` or ``"dontneed"``."""
        self.handle.advise(*self._span(start, stop), advice)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Where entries ``start:stop`` lie."""
        yield Extent(self.handle, *self._span(start, stop))

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        size = prod(self.shape)
        if not 0 <= start <= stop <= size:
            raise IndexError(f"{self.name}: entries {start}:{stop} of {size}")
        item = DTYPES[self.dtype].itemsize
        return self.offset + start * item, (stop - start) * item


def _check_room(out: Array, length: int) -> None:
    if out.dtype != np.uint8 or out.ndim != 1 or not out.flags.c_contiguous:
        raise ValueError(f"out must be 1-D contiguous uint8, got {out.dtype} {out.shape}")
    if out.size < length:
        raise ValueError(f"out holds {out.size} bytes, {length} are needed")


@dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """A safetensors file whose header has been read and found consistent.

    Attributes
    ----------
    path : Path
        As given.
    metadata : mapping of str to str
        ``__metadata__``; empty where the file has none.
    tensors : mapping of str to FileTensor
        In the order of their bytes.
    header_hash : str
        BLAKE2b-128 of the header (without its 8 length bytes), 32 hexadecimal digits.
    size : int
        Bytes of the file.
    mtime_ns : int
        Modification time, nanoseconds since the epoch.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, FileTensor]
    header_hash: str
    size: int
    mtime_ns: int


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises
    ------
    FormatError
        If it is not a safetensors file, is incomplete, or contradicts itself.
    MergebenchError
        If the system cannot open or read it.
    """
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            raise cannot("opened", path, error) from error
        raise MergebenchError(f"{str(path)!r}: cannot be opened", got=str(error)) from error
    # Opening a pipe would wait for a writer that never comes.
    if not stat.S_ISREG(kind):
        raise FormatError(
            f"{path}: is not a regular file", fix="pass a .safetensors file or a model folder"
        )
    handle = Handle(path)
    about = handle.stat()
    return read_safetensors(path, handle, about.st_size, about.st_mtime_ns)


def read_safetensors(path: Path, handle: Readable, size: int, mtime_ns: int) -> SafetensorsFile:
    """Read and check the header of what is read through ``handle``; see :func:`open_safetensors`.

    Raises
    ------
    FormatError
        If it is not a safetensors file, is incomplete, or contradicts itself.
    """
    raw = _read_header(handle, size)
    data = 8 + len(raw)
    metadata, entries = parse_header(raw, str(path), size - data)
    return SafetensorsFile(
        path=path,
        metadata=metadata,
        tensors={
            entry.name: FileTensor(entry.name, entry.dtype, entry.shape, data + entry.start, handle)
            for entry in entries
        },
        header_hash=hashlib.blake2b(raw, digest_size=16).hexdigest(),
        size=size,
        mtime_ns=mtime_ns,
    )


def _read_header(handle: Readable, size: int) -> bytes:
    path = handle.path
    if size == 0:
        raise FormatError(f"{path}: is empty", fix=_AGAIN)
    start = _read(handle, 0, min(size, _SNIFF))
    length = int.from_bytes(start[:8], "little")
    # The length of a sound file may look like the first bytes of any other format, so those are
    # compared only where no header follows.
    if not start[8:].lstrip(b" \t\r\n").startswith(b"{"):
        _refuse_foreign(path, start)
    if size < 8:
        raise FormatError(
            f"{path}: is too short", expected="at least 8 bytes", got=f"{size}", fix=_AGAIN
        )
    if length > MAX_HEADER:
        raise FormatError(
            f"{path}: is not a safetensors file, or its start is damaged",
            expected=f"a header of at most {MAX_HEADER} bytes",
            got=f"{length}",
            fix=_AGAIN,
        )
    if length > size - 8:
        raise FormatError(
            f"{path}: ends inside its header",
            expected=f"a header of {length} bytes",
            got=f"{size - 8}",
            fix=_AGAIN,
        )
    return _read(handle, 8, length)


def _read(handle: Readable, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    got = handle.read_at(memoryview(buffer), offset)
    if got < length:
        raise FormatError(f"{handle.path}: was cut while it was read", fix=_AGAIN)
    return bytes(buffer)


def _refuse_foreign(path: Path, start: bytes) -> None:
    # A third byte of zero is the length of a short header, in a file that was cut.
    for magic, what, fix in () if start[2:3] == b"\0" else _FOREIGN:
        if start.startswith(magic):
            raise FormatError(
                f"{path}: {what}",
                expected="a safetensors file",
                fix="convert it to safetensors" if fix == "convert it" else fix,
            )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise FormatError(
            f"{path}: is a web page, such as a login or error page",
            expected="a safetensors file",
            fix="download it again with the access it needs",
        )
