"""Sparse: most entries are 0, the others are stored in a dtype of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergebench.adapters_zoo.packing import CODECS, Block, Codec, Head
from mergebench.adapters_zoo.planes import (
    Bytes,
    Words,
    count_of,
    damaged,
    pack_plane,
    to_words,
    unpack_plane,
)
from mergebench.core.tensor import DTYPES, FLOATING, Array


@dataclass(frozen=True, eq=False)
class Sparse:
    """A block as the plane of what is stored, and its values in the dtype of the tensor."""

    plane: Words
    values: Array

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.plane.nbytes + self.values.nbytes

    def read(self, start: int, stop: int, out: Array) -> None:
        """Write entries ``start:stop`` of the block."""
        first = start // 8
        bits = np.unpackbits(self.plane.view(np.uint8)[first : -(-stop // 8)], bitorder="little")
        places = np.flatnonzero(bits[start - 8 * first : stop - 8 * first])
        before = count_of(self.plane, start)
        out[:] = 0
        out[places] = self.values[before : before + places.size]


def _pack(coded: Array) -> bytes:
    """From values in the dtype that they are stored in; zeros are not."""
    bits = coded != 0
    values: bytes = coded[bits].tobytes()
    return pack_plane(to_words(bits, coded.size), coded.size) + values


def _unpack(where: str, data: Bytes, size: int, head: Head) -> Block:
    plane, ones, taken = unpack_plane(where, data, size)
    stored = DTYPES[head.stored]
    if (head.stored not in FLOATING and head.stored != "I8") or head.dtype not in FLOATING:
        raise damaged(where, f"has values of no such dtype ({head.stored})")
    if data.size - taken != ones * stored.itemsize:
        raise damaged(where, "has another number of values than of places")
    values = data[taken:].copy().view(stored)
    with np.errstate(over="ignore", invalid="ignore"):
        if head.stored == "I8":
            values = values.astype(np.float32) * np.float32(head.numbers[0])
        return Sparse(plane, values.astype(DTYPES[head.dtype]))


CODECS.add(
    "sparse",
    Codec(
        name="sparse",
        tag=b"SPRS",
        formula="0 or the stored value (of I8: times the scale)",
        numbers=1,
        pack=_pack,
        unpack=_unpack,
    ),
)
