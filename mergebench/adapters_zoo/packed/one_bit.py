"""One bit: each entry is one of two values, a level above and below the mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergebench.adapters_zoo.packing import CODECS, Block, Codec, Head, values_of
from mergebench.adapters_zoo.planes import Bytes, damaged
from mergebench.core.tensor import Array


@dataclass(frozen=True, eq=False)
class OneBit:
    """A block as packed signs (set for minus) and the two values they stand for."""

    signs: Bytes
    values: Array

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.signs.nbytes

    def read(self, start: int, stop: int) -> Array:
        """Entries ``start:stop`` of the block."""
        first = start // 8
        bits = np.unpackbits(self.signs[first : -(-stop // 8)], bitorder="little")
        return self.values[bits[start - 8 * first : stop - 8 * first]]


def _pack(coded: Array) -> bytes:
    """From int8 of -1 and 1."""
    return np.packbits(coded < 0, bitorder="little").tobytes()


def _unpack(where: str, data: Bytes, size: int, head: Head) -> Block:
    if data.size != -(-size // 8):
        raise damaged(where, "has another number of signs than of entries")
    mean, level = (np.float32(each) for each in head.numbers)
    return OneBit(data, values_of(head, (mean + level, mean - level)))


CODECS.add(
    "one_bit",
    Codec(
        name="one_bit",
        tag=b"1BIT",
        formula="mean + level or mean - level",
        numbers=2,
        pack=_pack,
        unpack=_unpack,
    ),
)
