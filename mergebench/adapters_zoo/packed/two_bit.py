"""Two bits: each entry is one of four values, at two distances above and below the mean."""

from __future__ import annotations

import numpy as np

from mergebench.adapters_zoo.packing import CODECS, Block, Codec, Head, values_of
from mergebench.adapters_zoo.planes import (
    Bytes,
    Planes,
    bits_at,
    damaged,
    pack_plane,
    to_words,
    unpack_plane,
)
from mergebench.core.tensor import Array


def _pack(coded: Array) -> bytes:
    """From int8 of -2, -1, 1 and 2; the larger ones are the outer values."""
    signs = np.packbits(coded < 0, bitorder="little").tobytes()
    return pack_plane(to_words(np.abs(coded) == 2, coded.size), coded.size) + signs


def _unpack(where: str, data: Bytes, size: int, head: Head) -> Block:
    plane, _, taken = unpack_plane(where, data, size)
    if data.size - taken != -(-size // 8):
        raise damaged(where, "has another number of signs than of entries")
    mean, inner, outer = (np.float32(each) for each in head.numbers)
    values = values_of(head, (mean + inner, mean - inner, mean + outer, mean - outer))
    return Planes(plane, bits_at(data[taken:], size), values)


CODECS.add(
    "two_bit",
    Codec(
        name="two_bit",
        tag=b"2BIT",
        formula="mean + inner, mean - inner, mean + outer or mean - outer",
        numbers=3,
        pack=_pack,
        unpack=_unpack,
    ),
)
