"""Packed tensors: a head, a table of blocks, and blocks of 2^18 entries that stand alone.

A codec says what a block holds. It is one file of the folder ``packed`` and found there; this
module knows the head, the table and the checksums. ``docs/format.md`` has all of it byte by byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, Protocol

import numpy as np
import xxhash

from mergebench.adapters_zoo.planes import BLOCK, Bytes, damaged
from mergebench.adapters_zoo.scattered import checked_shape
from mergebench.core.registry import Registry
from mergebench.core.tensor import Array, Tensor, size_of

#: Dtypes by their number in heads.
NUMBERED = (
    "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F8_E4M3", "F8_E5M2", "F16",
    "BF16", "F32", "F64", "C64",
)  # fmt: skip
_START = struct.Struct("<4s4B")
_SUM = struct.Struct("<Q")
#: A row of the table: the bytes of a block, and their xxh3-64.
ROW = np.dtype([("bytes", "<u4"), ("sum", "<u8")])
_DIMS = 8


@dataclass(frozen=True)
class Head:
    """What is known of a packed tensor before a block is read.

    Attributes
    ----------
    codec : str
    dtype : str
        What entries are unpacked to.
    shape : tuple of int
    numbers : tuple of float
        Exact in float32: levels, scales; the codec says which.
    stored : str
        Dtype of values that stand in blocks, for codecs that have some.
    """

    codec: str
    dtype: str
    shape: tuple[int, ...]
    numbers: tuple[float, ...] = ()
    stored: str = "BOOL"

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)


class Block(Protocol):
    """An unpacked block."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        ...

    def read(self, start: int, stop: int, out: Array) -> None:
        """Write entries ``start:stop`` of the block to an array of them in the tensor's dtype."""
        ...


@dataclass(frozen=True)
class Codec:
    """One way to pack blocks.

    Attributes
    ----------
    name : str
    tag : bytes
        Four letters that packed tensors start with.
    formula : str
        What an entry is unpacked to.
    numbers : int
        How many numbers the head has.
    pack : callable
        ``(coded) -> bytes`` of one block; what ``coded`` is, the codec says.
    unpack : callable
        ``(where, data, size, head) -> Block``; raises FormatError for data that contradict
        themselves, and takes memory in proportion to ``size``.
    """

    name: str
    tag: bytes
    formula: str
    numbers: int
    pack: Callable[[Array], bytes]
    unpack: Callable[[str, Bytes, int, Head], Block]


CODECS: Registry[Codec] = Registry(
    "codec", "mergebench.adapters_zoo.packed", "mergebench.packed_codecs"
)


def values_of(head: Head, levels: Sequence[Any]) -> Array:
    """Levels, summed up in float32, in the dtype of a tensor."""
    from mergebench.core.tensor import DTYPES

    with np.errstate(over="ignore"):
        return np.array(levels, np.float32).astype(DTYPES[head.dtype])


def blocks_of(size: int) -> Iterator[tuple[int, int]]:
    """First entry of each block, and the one after its last."""
    for start in range(0, size, BLOCK):
        yield start, min(start + BLOCK, size)


def head_bytes(name: str, head: Head, table: Array) -> bytes:
    """Head and table as they stand before the blocks.

    Parameters
    ----------
    name : str
        Of the tensor; it is under the checksum.
    head : Head
    table : array of :data:`ROW`
        One row for each block.
    """
    start = _START.pack(
        CODECS[head.codec].tag,
        NUMBERED.index(head.dtype),
        NUMBERED.index(head.stored),
        len(head.shape),
        len(head.numbers),
    )
    start += struct.pack(f"<{len(head.shape)}Q{len(head.numbers)}f", *head.shape, *head.numbers)
    rows = table.tobytes()
    return start + _SUM.pack(xxhash.xxh3_64_intdigest(start + rows + name.encode())) + rows


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed tensor whose head and table have been read and checked.

    Attributes
    ----------
    where : str
        File and tensor, for messages.
    head : Head
    blob : Tensor, (bytes,)
        U8, as the file has it.
    table : array of :data:`ROW`
    begin : int
        The byte after the table.
    """

    where: str
    head: Head
    blob: Tensor
    table: Array
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return size_of(self.blob.shape)

    def block(self, number: int) -> Block:
        """Read, check and unpack a block.

        Raises
        ------
        FormatError
            If it is damaged.
        """
        where = f"{self.where}: block {number}"
        at = self.begin + int(self.table["bytes"][:number].sum(dtype=np.int64))
        length = int(self.table["bytes"][number])
        data = np.ascontiguousarray(self.blob.read(at, at + length)).view(np.uint8)
        if xxhash.xxh3_64_intdigest(data.data) != int(self.table["sum"][number]):
            raise damaged(where, "does not have the checksum of its table")
        size = min(BLOCK, self.head.size - number * BLOCK)
        return CODECS[self.head.codec].unpack(where, data, size, self.head)


def open_packed(label: str, name: str, blob: Tensor) -> Packed:
    """Read and check the head and the table of a packed tensor, but no block.

    Raises
    ------
    FormatError
        If they are damaged, of no known codec, or state more than the tensor's bytes hold. Nothing
        is read or allocated beyond these.
    """
    where = f"{label}: {name}"
    held = size_of(blob.shape)
    if blob.dtype != "U8" or len(blob.shape) != 1 or held < _START.size:
        raise damaged(where, "is no packed tensor")
    tag, dtype, stored, dims, count = _START.unpack(blob.read(0, _START.size).tobytes())
    known = {CODECS[each].tag: CODECS[each] for each in CODECS}
    after = _START.size + 8 * dims + 4 * count
    if tag not in known or dims > _DIMS or max(dtype, stored) >= len(NUMBERED):
        raise damaged(where, f"has a head of no known codec ({tag!r})")
    codec = known[tag]
    if count != codec.numbers or held < after + _SUM.size:
        raise damaged(where, "has a head of another size than its codec's")
    start = blob.read(0, after).tobytes()
    fields = struct.unpack(f"<{dims}Q{count}f", start[_START.size :])
    shape = checked_shape(where, fields[:dims])
    begin = after + _SUM.size
    blocks = -(-prod(shape) // BLOCK)
    if blocks * ROW.itemsize > held - begin:
        raise damaged(where, f"has a shape, {shape}, that its {held} bytes cannot hold")
    (total,) = _SUM.unpack(blob.read(after, begin).tobytes())
    rows = blob.read(begin, begin + blocks * ROW.itemsize).tobytes()
    if xxhash.xxh3_64_intdigest(start + rows + name.encode()) != total:
        raise damaged(where, "does not have the checksum of its head")
    table = np.frombuffer(rows, ROW)
    begin += len(rows)
    if begin + int(table["bytes"].sum(dtype=np.int64)) != held:
        raise damaged(where, f"has blocks that do not fill its {held} bytes")
    numbers = tuple(float(each) for each in fields[dims:])
    if not all(isfinite(each) for each in numbers):
        raise damaged(where, "has levels that are not finite")
    head = Head(codec.name, NUMBERED[dtype], shape, numbers, NUMBERED[stored])
    return Packed(where, head, blob, table, begin)


def pack_block(codec: str, coded: Array) -> tuple[bytes, Any]:
    """A block and its row of the table."""
    data = CODECS[codec].pack(coded)
    return data, np.array((len(data), xxhash.xxh3_64_intdigest(data)), ROW)
