"""Ternary: each entry is one of three values, around a mean that is mostly 0 (ComPEFT)."""

from __future__ import annotations

import numpy as np

from mergebench.adapters_zoo.packing import CODECS, Block, Codec, Head, values_of
from mergebench.adapters_zoo.planes import (
    Bytes,
    Planes,
    bits_at,
    bytes_of,
    damaged,
    pack_plane,
    unpack_plane,
)
from mergebench.core.tensor import Array


def _pack(coded: Array) -> bytes:
    """From int8 of -1, 0 and 1."""
    from mergebench.compute.planes import split

    plane, signs = (np.zeros(coded.size // 64 + 2, np.uint64) for _ in range(2))
    ones = int(split(coded, plane, signs))
    return pack_plane(plane, coded.size) + bytes_of(signs, ones)


def _unpack(where: str, data: Bytes, size: int, head: Head) -> Block:
    from mergebench.compute.planes import deposit

    plane, ones, taken = unpack_plane(where, data, size)
    if data.size - taken != -(-ones // 8):
        raise damaged(where, "has another number of signs than of entries")
    mean, level = (np.float32(each) for each in head.numbers)
    values = values_of(head, (mean, mean, mean + level, mean - level))
    signs = np.empty_like(plane)
    deposit(plane, bits_at(data[taken:], ones), signs)
    return Planes(plane, signs, values)


CODECS.add(
    "ternary",
    Codec(
        name="ternary",
        tag=b"TERN",
        formula="mean, mean + level or mean - level",
        numbers=2,
        pack=_pack,
        unpack=_unpack,
    ),
)
