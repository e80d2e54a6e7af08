"""A plane of bits inside a block of a packed file: coded where that is shorter, else as it is.

Twelve bytes say how: the class of the code (0 for none; bit 7 set if bits are inverted), how many
bits are set (3 bytes), and the bytes of each of four streams (2 bytes each), which follow.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.words import CLASSES, class_of, code_of
from mergebench.core.errors import FormatError
from mergebench.core.tensor import Array

Words = NDArray[np.uint64]
Bytes = NDArray[np.uint8]
#: Entries of a block.
BLOCK = 1 << 18
#: Bytes before the streams of a plane.
HEAD = struct.Struct("<I4H")
_INVERTED = 1 << 7
_SPARE = 20


@dataclass(frozen=True, eq=False)
class Planes:
    """A block whose entries are each one of four values.

    Attributes
    ----------
    plane, signs : uint64 array
    values : array, (4,)
        For an entry the one at ``2 · bit + sign``.
    """

    plane: Words
    signs: Words
    values: Array

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.plane.nbytes + (0 if self.signs is self.plane else self.signs.nbytes)

    def read(self, start: int, stop: int, out: Array) -> None:
        """Write entries ``start:stop`` of the block."""
        from mergebench.compute.planes import spread

        # Kernels know neither bfloat16 nor float8: entries are moved, not computed with.
        raw = np.dtype(f"u{out.itemsize}")
        wanted = out.view(raw)
        # Compiled code takes every number to stand at a multiple of its size.
        target = wanted if wanted.flags.aligned else np.empty(out.size, raw)
        spread(self.plane, self.signs, start, stop, self.values.view(raw), target)
        if target is not wanted:
            wanted[:] = target


def to_words(bits: NDArray[np.bool_] | Bytes, size: int, spare: int = _SPARE) -> Words:
    """Booleans, or bytes of eight bits each (the first is the lowest), as words with spare ones."""
    words = np.zeros(-(-size // 64) + spare, np.uint64)
    packed = np.packbits(bits, bitorder="little") if bits.dtype == np.bool_ else bits
    words.view(np.uint8)[: packed.size] = packed
    return words


def count_of(words: Words, stop: int) -> int:
    """How many of the first ``stop`` bits are set."""
    whole, rest = divmod(stop, 64)
    count = int(np.bitwise_count(words[:whole]).sum())
    return count + (int(words[whole]) & ((1 << rest) - 1)).bit_count() if rest else count


def _part(size: int) -> int:
    return -(-size // 256) * 64


def pack_plane(plane: Words, size: int) -> bytes:
    """The plane of a block of up to 2^18 entries, with its head.

    Parameters
    ----------
    plane : uint64 array
        With a spare word; bits from ``size`` on are zeros.
    size : int
    """
    ones = count_of(plane, size)
    inverted = 2 * ones > size
    number = class_of(size - ones if inverted else ones, size)
    if number:
        coded = _coded(~plane if inverted else plane, size, number)
        if coded is not None and sum(map(len, coded)) < -(-size // 8):
            kind = number | (_INVERTED if inverted else 0)
            lengths = [len(stream) for stream in coded]
            return HEAD.pack(kind | ones << 8, *lengths) + b"".join(coded)
    return HEAD.pack(ones << 8, 0, 0, 0, 0) + bytes_of(plane, size)


def bytes_of(words: Words, size: int) -> bytes:
    """The first ``size`` bits, eight to a byte."""
    return words.view(np.uint8)[: -(-size // 8)].tobytes()


def _coded(plane: Words, size: int, number: int) -> list[bytes] | None:
    """Four streams; ``None`` if one is longer than its bits."""
    from mergebench.compute.planes import encode

    part = _part(size)
    tree, streams = code_of(number).tree, []
    for start in range(0, 4 * part, part):
        begin, end = min(start, size), min(start + part, size)
        out = np.zeros(part // 64 + 3, np.uint64)
        if begin < end:
            written = encode(plane, begin, end, tree, out)
            if not written:
                return None
            streams.append(out.view(np.uint8)[: -(-written // 8)].tobytes())
        else:
            streams.append(b"")
    return streams


def unpack_plane(where: str, data: Bytes, size: int) -> tuple[Words, int, int]:
    """The plane at the start of ``data``, how many bits are set, and the bytes that it took.

    Raises
    ------
    FormatError
        If the bytes are not those of a plane of ``size`` bits.
    """
    if data.size < HEAD.size:
        raise damaged(where, "ends within the head of a plane")
    first, *lengths = HEAD.unpack(data[: HEAD.size].tobytes())
    kind, ones = first & 255, first >> 8
    if not kind:
        taken = HEAD.size + -(-size // 8)
        if any(lengths) or data.size < taken:
            raise damaged(where, "ends within a plane")
        plane = to_words(data[HEAD.size : taken], size)
        _clear(plane, size)
        found = count_of(plane, size)
    else:
        taken = HEAD.size + sum(lengths)
        if (kind & ~_INVERTED) not in CLASSES or data.size < taken:
            raise damaged(where, "has a plane of no known code, or ends within it")
        plane, found = _decoded(where, data[HEAD.size : taken], lengths, kind, size)
    if found != ones:
        raise damaged(where, "has a plane with another number of bits than it says")
    return plane, ones, taken


def _clear(plane: Words, size: int) -> None:
    """Leave no bit after the last one."""
    whole, rest = divmod(size, 64)
    if rest:
        plane[whole] &= np.uint64((1 << rest) - 1)
        whole += 1
    plane[whole:] = 0


def _decoded(
    where: str, data: Bytes, lengths: list[int], kind: int, size: int
) -> tuple[Words, int]:
    from mergebench.compute.planes import decode

    part = _part(size)
    # Parts that a short plane does not fill have no stream.
    used = -(-size // part)
    if any((length == 0) != (place >= used) for place, length in enumerate(lengths)):
        raise damaged(where, "has streams that do not fill its plane")
    words = np.zeros(sum(-(-length // 8) for length in lengths) + 3, np.uint64)
    held = words.view(np.uint8)
    bits = np.zeros((3, 4), np.uint64)
    at = taken = 0
    for place, length in enumerate(lengths):
        held[at : at + length] = data[taken : taken + length]
        bits[:2, place] = 8 * at, 8 * (at + length)
        at, taken = at + -(-length // 8) * 8, taken + length
    plane = np.zeros(part // 16 + _SPARE, np.uint64)
    bits[2] = [min((place + 1) * part, max(size, place * part)) for place in range(4)]
    inverted, code = bool(kind & _INVERTED), code_of(kind & ~_INVERTED)
    ones = int(decode(words, bits, code.look, code.longest, size, inverted, plane))
    if ones < 0:
        raise damaged(where, "has a stream that does not end with its plane")
    return plane, ones


def damaged(where: str, what: str) -> FormatError:
    """The error for a file whose bytes contradict each other."""
    return FormatError(f"{where}: {what}", fix="the file is damaged: download or pack it again")


def bits_at(data: Bytes, size: int) -> Words:
    """``size`` packed bits, as words with spare ones."""
    return to_words(data[: -(-size // 8)], size)
