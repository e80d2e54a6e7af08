"""Ternary: each entry is one of three values, around a mean that is mostly 0 (ComPEFT)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergebench.adapters_zoo.packing import CODECS, Block, Codec, Head, values_of
from mergebench.adapters_zoo.planes import (
    Bytes,
    Words,
    bits_at,
    bytes_of,
    count_of,
    damaged,
    pack_plane,
    unpack_plane,
)
from mergebench.core.tensor import Array


@dataclass(frozen=True, eq=False)
class Ternary:
    """A block as the plane of what is not the mean, and signs of that.

    Attributes
    ----------
    plane : uint64 array
    signs : uint64 array
        A bit for each bit set in the plane, in order; set for minus.
    values : array, (4,)
        Mean, mean, mean + level, mean - level.
    """

    plane: Words
    signs: Words
    values: Array

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.plane.nbytes + self.signs.nbytes

    def read(self, start: int, stop: int) -> Array:
        """Entries ``start:stop`` of the block."""
        from mergebench.compute.planes import spread

        out = np.empty(stop - start, self.values.dtype)
        # Kernels know neither bfloat16 nor float8: entries are moved, not computed with.
        raw = np.dtype(f"u{out.itemsize}")
        first = np.uint64(count_of(self.plane, start))
        begin, end = np.uint64(start), np.uint64(stop)
        spread(self.plane, begin, end, self.signs, first, self.values.view(raw), out.view(raw))
        return out


def _pack(coded: Array) -> bytes:
    """From int8 of -1, 0 and 1."""
    from mergebench.compute.planes import split

    plane, signs = (np.zeros(coded.size // 64 + 2, np.uint64) for _ in range(2))
    ones = int(split(coded, plane, signs))
    return pack_plane(plane, coded.size) + bytes_of(signs, ones)


def _unpack(where: str, data: Bytes, size: int, head: Head) -> Block:
    plane, ones, taken = unpack_plane(where, data, size)
    if data.size - taken != -(-ones // 8):
        raise damaged(where, "has another number of signs than of entries")
    mean, level = (np.float32(each) for each in head.numbers)
    values = values_of(head, (mean, mean, mean + level, mean - level))
    return Ternary(plane, bits_at(data[taken:], ones), values)


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
