"""One bit: each entry is one of two values, a level above and below the mean."""

from __future__ import annotations

import numpy as np

from mergebench.adapters_zoo.packing import CODECS, Block, Codec, Head, values_of
from mergebench.adapters_zoo.planes import Bytes, Planes, bits_at, damaged
from mergebench.core.tensor import Array


def _pack(coded: Array) -> bytes:
    """From int8 of -1 and 1."""
    return np.packbits(coded < 0, bitorder="little").tobytes()


def _unpack(where: str, data: Bytes, size: int, head: Head) -> Block:
    if data.size != -(-size // 8):
        raise damaged(where, "has another number of signs than of entries")
    mean, level = (np.float32(each) for each in head.numbers)
    above, below, signs = mean + level, mean - level, bits_at(data, size)
    return Planes(signs, signs, values_of(head, (above, above, below, below)))


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
