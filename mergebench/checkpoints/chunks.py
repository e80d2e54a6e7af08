"""Tensors that lie in chunks, each a file of ``torch.save`` at some place of a larger file."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, BinaryIO, cast

import numpy as np

from mergebench.checkpoints.descriptors import Handle
from mergebench.checkpoints.torch_files import AGAIN, dtype_of, load_weights
from mergebench.core.errors import FormatError
from mergebench.core.extents import Extent
from mergebench.core.tensor import DTYPES, Array

# Of a zip record: fixed bytes before its name, and where the lengths of name and extra are.
_LOCAL, _LENGTHS = 30, 26


@dataclass(frozen=True)
class _Place:
    """Where the numbers of a chunk begin in the file, and their strides in entries."""

    offset: int
    entries: int
    first: int
    strides: tuple[int, ...]
    dense: bool


@dataclass(eq=False)
class Chunk:
    """A box of a tensor.

    Attributes
    ----------
    name, dtype : str
        Of the tensor.
    starts, sizes : tuple of int
        The box: its first index and its extent in every dimension.
    handle : Handle
        The file.
    offset, length : int
        Bytes of the file that are the chunk.
    """

    name: str
    dtype: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    handle: Handle = field(repr=False)
    offset: int
    length: int

    @cached_property
    def place(self) -> _Place:
        """Read from the chunk's own zip directory and pickle, once.

        Raises
        ------
        FormatError
            If the chunk is damaged, or not the tensor that the metadata promise.
        """
        where = f"{self.handle.path}: chunk of {self.name!r} at byte {self.offset}"
        stream = cast("BinaryIO", io.BufferedReader(_Window(self.handle, self.offset, self.length)))
        try:
            with zipfile.ZipFile(stream) as archive:
                records = [each for each in archive.infolist() if "/data/" in each.filename]
            (record,) = records
            stream.seek(record.header_offset + _LENGTHS)
            names = sum(struct.unpack("<HH", stream.read(4)))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise FormatError(f"{where}: is damaged", got=str(error), fix=AGAIN) from error
        stream.seek(0)
        tensor: Any = load_weights(stream, where, mmap=False, location="meta")
        got = f"{getattr(tensor, 'dtype', type(tensor).__name__)} {getattr(tensor, 'shape', '')}"
        item = DTYPES[self.dtype].itemsize
        if (
            not hasattr(tensor, "stride")
            or tuple(tensor.shape) != self.sizes
            or dtype_of(where, self.name, tensor.dtype) != self.dtype
            or record.compress_type != zipfile.ZIP_STORED
            or tensor.untyped_storage().nbytes() != record.file_size
        ):
            raise FormatError(
                f"{where}: is not what the metadata say",
                expected=f"{self.dtype} {self.sizes}",
                got=got,
                fix=AGAIN,
            )
        return _Place(
            offset=self.offset + record.header_offset + _LOCAL + names,
            entries=record.file_size // item,
            first=tensor.storage_offset(),
            strides=tuple(tensor.stride()),
            dense=tensor.is_contiguous(),
        )

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of the box (its first dimension), shape ``(stop-start, ...)``."""
        dtype, rest = DTYPES[self.dtype], self.sizes[1:]
        if self.place.dense:
            flat = np.empty((stop - start) * prod(rest), dtype)
            self.read(start * prod(rest), flat)
            return flat.reshape(stop - start, *rest)
        # Strides as torch saved them: only the whole storage is one range of the file.
        flat = np.empty(self.place.entries, dtype)
        self._fill(flat, 0)
        strides = [step * dtype.itemsize for step in self.place.strides]
        whole = np.lib.stride_tricks.as_strided(flat[self.place.first :], self.sizes, strides)
        return whole[start:stop]

    def read(self, start: int, out: Array) -> None:
        """Entries from ``start`` on into a flat array; only where ``place.dense``."""
        self._fill(out, self.place.first + start)

    def _fill(self, out: Array, first: int) -> None:
        view = out.view(np.uint8).data
        got = self.handle.read_at(view, self.place.offset + first * out.itemsize)
        if got < len(view):
            raise FormatError(
                f"{self.handle.path}: the file ends inside tensor {self.name!r}",
                expected=f"{len(view)} bytes",
                got=f"{got}",
                fix="it was cut while in use; " + AGAIN,
            )


@dataclass(frozen=True, eq=False)
class ChunkedTensor:
    """One tensor of a DCP folder, read on demand.

    Attributes
    ----------
    name : str
        Its key in the metadata.
    dtype : str
        Stored dtype, a key of :data:`mergebench.core.tensor.DTYPES`.
    shape : tuple of int
        Shape; ``()`` for a scalar.
    chunks : tuple of Chunk
        Boxes that cover the shape exactly once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor, shape ``(stop-start,)``, stored dtype.

        With ``out`` (uint8, at least as many bytes) they land there and the result is a view of
        it. Any number of threads may read. Chunks of whole rows are read by range; of others, all
        rows that hold a wanted entry.

        Raises
        ------
        FormatError
            If a chunk is damaged or not what the metadata say.
        MergebenchError
            If the system cannot read a file.
        IndexError
            If the range does not fit: a mistake of the caller.
        """
        if not 0 <= start <= stop <= prod(self.shape):
            raise IndexError(f"{self.name}: entries {start}:{stop} of {prod(self.shape)}")
        dtype = DTYPES[self.dtype]
        count = stop - start
        raw = np.empty(count * dtype.itemsize, np.uint8) if out is None else out
        flat = raw[: count * dtype.itemsize].view(dtype)
        if count:
            row = prod(self.shape[1:])
            first, last = start // row, -(-stop // row)
            wanted = [chunk for chunk in self.chunks if _meets(chunk, first, last)]
            if all(chunk.sizes[1:] == self.shape[1:] and chunk.place.dense for chunk in wanted):
                self._read_ranges(wanted, start, flat)
            else:
                block = self._read_block(wanted, first, last)
                flat[:] = block.reshape(-1)[start - first * row : stop - first * row]
        return flat

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """About where entries ``start:stop`` lie: a chunk has a few bytes beside its numbers."""
        row = max(prod(self.shape[1:]), 1)
        first, last = start // row, -(-stop // row)
        for chunk in self.chunks if start < stop else ():
            if _meets(chunk, first, last):
                rows = chunk.sizes[0] if chunk.sizes else 1
                low = chunk.length * max(first - _first(chunk), 0) // rows
                high = chunk.length * min(last - _first(chunk), rows) // rows
                yield Extent(chunk.handle, chunk.offset + low, high - low)

    def _read_ranges(self, chunks: list[Chunk], start: int, flat: Array) -> None:
        row, stop = prod(self.shape[1:]), start + len(flat)
        for chunk in chunks:
            begin = _first(chunk) * row
            lo, hi = max(start, begin), min(stop, begin + prod(chunk.sizes))
            if lo < hi:
                chunk.read(lo - begin, flat[lo - start : hi - start])

    def _read_block(self, chunks: list[Chunk], first: int, last: int) -> Array:
        block = np.empty((last - first, *self.shape[1:]), DTYPES[self.dtype])
        for chunk in chunks:
            begin = chunk.starts[0]
            lo, hi = max(first, begin), min(last, begin + chunk.sizes[0])
            others = zip(chunk.starts[1:], chunk.sizes[1:], strict=True)
            box = (slice(lo - first, hi - first), *(slice(at, at + size) for at, size in others))
            block[box] = chunk.rows(lo - begin, hi - begin)
        return block


def _first(chunk: Chunk) -> int:
    return chunk.starts[0] if chunk.starts else 0


def _meets(chunk: Chunk, first: int, last: int) -> bool:
    rows = chunk.sizes[0] if chunk.sizes else 1
    return prod(chunk.sizes) > 0 and _first(chunk) < last and first < _first(chunk) + rows


class _Window(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, handle: Handle, offset: int, length: int) -> None:
        super().__init__()
        self._handle, self._offset, self._length = handle, offset, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._length - self._at)]
        got = self._handle.read_at(view, self._offset + self._at)
        self._at += got
        return got
