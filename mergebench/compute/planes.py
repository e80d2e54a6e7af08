"""Kernels for planes: one bit for each entry of a piece of a tensor, 64 to a word.

Where few bits are set they are coded by the words of :mod:`mergebench.compute.words`, as four
streams, one for each quarter of the plane, which a decoder reads in turn so that none waits for
the other. No index depends on what a stream holds but within bounds that are checked: a stream ends
where its caller says, and words that would run over the end of a plane reach at most
:data:`SPARE` words further.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.jit import inner, kernel, ones

Words = NDArray[np.uint64]
#: Words that a plane needs after its last bit, for decoding.
SPARE = 20
_U = np.uint64
# One of everything, as numba would make signed numbers of plain ones.
_0, _1, _2, _4, _6, _8, _14, _16 = (_U(each) for each in (0, 1, 2, 4, 6, 8, 14, 16))
_15, _31, _32, _48, _56, _63 = (_U(each) for each in (15, 31, 32, 48, 56, 63))
_BYTE, _LENGTH, _LOOK = _U(255), _U(1023), _U(4095)


@kernel
def _peek(words: Words, at: Any) -> Any:
    """The 64 bits from bit ``at`` on."""
    place, shift = at >> _6, at & _63
    return (words[place] >> shift) | ((words[place + _1] << _1) << (_63 - shift))


@kernel
def encode(plane: Words, start: Any, stop: Any, tree: NDArray[np.uint32], out: Words) -> Any:
    """Code bits ``start:stop`` of a plane; the bits written.

    Parameters
    ----------
    plane : uint64 array
        With a word after the one of the last bit.
    start, stop : int
    tree : uint32 array
        Of a :class:`~mergebench.compute.words.Code`.
    out : uint64 array of zeros
        Written up to where it ends but for two words; 0 is returned if that is too early.
    """
    at, end = _U(start), _U(stop)
    put, room = _0, _U(len(out) - 2) << _6
    while at < end:
        node, here = _0, at
        while True:
            # After the last bit come zeros until a word ends.
            window = _0
            if here < end:
                window = _peek(plane, here)
                if end - here < _8:
                    window &= (_1 << (end - here)) - _1
            entry = _U(tree[(node << _8) | (window & _BYTE)])
            if entry >> _31:
                break
            node = entry
            here += _8
        if put >= room:
            return 0
        code = (entry >> _4) & _LOOK
        place, shift = put >> _6, put & _63
        out[place] |= code << shift
        out[place + _1] |= (code >> _1) >> (_63 - shift)
        put += entry & _15
        at += (entry >> _16) & _LENGTH
    return np.int64(put)


@kernel
def _put(plane: Words, at: Any, entry: Any) -> Any:
    """Set the bits of a word of the plane's, whose first bit is at ``at``."""
    at = at + ((entry >> _14) & _LENGTH)
    bits = entry >> _32
    place, shift = at >> _6, at & _63
    plane[place] |= bits << shift
    plane[place + _1] |= (bits >> _1) >> (_63 - shift)


@kernel
def _four(words: Words, at: Any, look: Words, plane: Words, to: Any) -> Any:
    """Decode four words at ``at`` of a stream to bits from ``to`` on; where both go on."""
    window = _peek(words, at)
    for _ in range(4):
        entry = look[window & _LOOK]
        window >>= entry & _15
        at += entry & _15
        _put(plane, to, entry)
        to += (entry >> _4) & _LENGTH
    return at, to


@kernel
def _four_short(words: Words, at: Any, look: Words, plane: Words, to: Any) -> Any:
    """As ``_four``, for words of at most 32 bits, of which two are set at once."""
    window = _peek(words, at)
    for _ in range(2):
        one = look[window & _LOOK]
        window >>= one & _15
        two = look[window & _LOOK]
        window >>= two & _15
        at += (one & _15) + (two & _15)
        size = (one >> _4) & _LENGTH
        bits = (one >> _32) << ((one >> _14) & _LENGTH)
        bits |= ((two >> _32) << ((two >> _14) & _LENGTH)) << size
        place, shift = to >> _6, to & _63
        plane[place] |= bits << shift
        plane[place + _1] |= (bits >> _1) >> (_63 - shift)
        to += size + ((two >> _4) & _LENGTH)
    return at, to


@kernel
def _rest(words: Words, at: Any, stop: Any, look: Words, to: Any, end: Any, plane: Words) -> Any:
    """Decode the last words of a stream; where it ended, or the largest number if too early."""
    while to < end:
        if at >= stop:
            return ~_0
        entry = look[_peek(words, at) & _LOOK]
        at += entry & _15
        _put(plane, to, entry)
        to += (entry >> _4) & _LENGTH
    return at


@kernel
def decode(
    words: Words, bits: Words, look: Words, longest: Any, size: Any, flip: Any, plane: Words
) -> Any:
    """Decode the four streams of a plane; how many bits are set.

    -1 where a stream does not end within the last 8 bits of its own.

    Parameters
    ----------
    words : uint64 array
        Holds the streams, and two words after them.
    bits : uint64 array, (3, 4)
        First bit of each stream, the one after its last, and the bit after the last of its quarter
        of the plane (of an empty one its first).
    look, longest
        Of a :class:`~mergebench.compute.words.Code`.
    size : int
        Bits of the plane.
    flip : bool
        Whether the plane has ones where zeros were coded.
    plane : uint64 array of zeros
        Four quarters of ⌈size / 256⌉ words, and :data:`SPARE` words.
    """
    starts, stops, ends = bits[0], bits[1], bits[2]
    most, quarter = _U(longest), ((_U(size) + _BYTE) >> _8) << _6
    i0, i1, i2, i3 = starts[0], starts[1], starts[2], starts[3]
    s0, s1, s2, s3 = stops[0], stops[1], stops[2], stops[3]
    o0, o1, o2, o3 = _0, quarter, quarter + quarter, quarter + quarter + quarter
    e0, e1, e2, e3 = ends[0], ends[1], ends[2], ends[3]
    while True:
        # Neither a stream nor its quarter can end within so many steps of four words.
        count = min(
            min(e0 - o0, e1 - o1, e2 - o2, e3 - o3) // (_4 * most),
            min(s0 - i0, s1 - i1, s2 - i2, s3 - i3) // _48,
        )
        if count == _0:
            break
        if most <= _32:
            for _ in range(count):
                i0, o0 = _four_short(words, i0, look, plane, o0)
                i1, o1 = _four_short(words, i1, look, plane, o1)
                i2, o2 = _four_short(words, i2, look, plane, o2)
                i3, o3 = _four_short(words, i3, look, plane, o3)
        else:
            for _ in range(count):
                i0, o0 = _four(words, i0, look, plane, o0)
                i1, o1 = _four(words, i1, look, plane, o1)
                i2, o2 = _four(words, i2, look, plane, o2)
                i3, o3 = _four(words, i3, look, plane, o3)
    i0 = _rest(words, i0, s0, look, o0, e0, plane)
    i1 = _rest(words, i1, s1, look, o1, e1, plane)
    i2 = _rest(words, i2, s2, look, o2, e2, plane)
    i3 = _rest(words, i3, s3, look, o3, e3, plane)
    full = s0 - i0 < _8 and s1 - i1 < _8 and s2 - i2 < _8 and s3 - i3 < _8
    if not (full and i0 <= s0 and i1 <= s1 and i2 <= s2 and i3 <= s3):
        return -1
    return _settle(plane, size, ~_0 if flip else _0)


@kernel
def _settle(plane: Words, size: Any, flip: Any) -> Any:
    """Turn bits round where asked, leave none after the last, and count them."""
    whole, count = size >> 6, 0
    for place in range(whole):
        word = plane[place] ^ flip
        plane[place] = word
        count += ones(word)
    for place in range(whole, len(plane)):
        plane[place] = (plane[place] ^ flip) & ((_1 << (_U(size) & _63)) - _1)
        count += ones(plane[place])
        size = 0
    return count


@kernel
def split(coded: NDArray[np.int8], plane: Words, signs: Words) -> Any:
    """Where entries are not zero, and the signs of those (set for minus); how many they are.

    Parameters
    ----------
    coded : int8 array, (m,)
    plane, signs : uint64 arrays of zeros
        Room for m bits each, and a word.
    """
    at = _0
    for start in range(0, len(coded), 64):
        found = _0
        for place in range(start, min(start + 64, len(coded))):
            bit = _U(coded[place] != 0)
            found |= bit << _U(place - start)
            signs[at >> _6] |= _U(coded[place] < 0) << (at & _63)
            at += bit
        plane[_U(start) >> _6] = found
    return np.int64(at)


@kernel
def spread(plane: Words, signs: Words, start: Any, stop: Any, values: Any, out: Any) -> None:
    """One of four values for each of the bits ``start:stop``: the one at ``2 · bit + sign``.

    Parameters
    ----------
    plane, signs : uint64 array
    start, stop : int
    values : array of unsigned integers, (4,)
    out : array, (stop - start,)
        Of the dtype of the values.
    """
    number = start
    while number < stop:
        word, sign = plane[_U(number) >> _6], signs[_U(number) >> _6]
        end = min(stop, (number | 63) + 1)
        if end - number == 64:
            for half in range(2):
                shift, first = _U(32 * half), number - start + 32 * half
                _select(word >> shift, sign >> shift, values, out[first : first + 32])
        else:
            for each in range(number, end):
                place = _U(each) & _63
                bit, own = (word >> place) & _1, (sign >> place) & _1
                out[each - start] = values[(bit << _1) | own]
        number = end


@inner
def _select(word: Any, sign: Any, values: Any, out: Any) -> None:
    """32 entries at once: numbers of 32 bits, and choices that are no jumps and no look-ups."""
    a, b, c, d = values[0], values[1], values[2], values[3]
    bits, signs = np.uint32(word), np.uint32(sign)
    for j in range(32):
        bit, own = (bits >> np.uint32(j)) & np.uint32(1), (signs >> np.uint32(j)) & np.uint32(1)
        unset, set_ = b if own else a, d if own else c
        out[j] = set_ if bit else unset


@kernel
def _step(mask: Any, above: Any, by: Any) -> Any:
    """A step of :func:`deposit`: which bits move by so many places, and what is left."""
    odd = above ^ (above << _1)
    odd ^= odd << _2
    odd ^= odd << _4
    odd ^= odd << _8
    odd ^= odd << _16
    odd ^= odd << _32
    moved = odd & mask
    return moved, (mask ^ moved) | (moved >> by), above & ~odd


@kernel
def deposit(plane: Words, signs: Words, out: Words) -> None:
    """A bit for each bit set in a plane, in order, to where that is; others become zeros.

    All words at once, without branches: signs are moved up in steps of 32, 16, … 1 places (Warren,
    Hacker's Delight, 7-5), which compilers turn into instructions on several words.

    Parameters
    ----------
    plane : uint64 array, (m,)
    signs : uint64 array
        The bits, with two words after the last.
    out : uint64 array, (m,)
    """
    at = _0
    for place in range(len(out)):
        out[place] = _peek(signs, at)
        at += _U(ones(plane[place]))
    for place in range(len(out)):
        mask, bits = plane[place], out[place]
        above = ~mask << _1
        a, mask, above = _step(mask, above, _1)
        b, mask, above = _step(mask, above, _2)
        c, mask, above = _step(mask, above, _4)
        d, mask, above = _step(mask, above, _8)
        e, mask, above = _step(mask, above, _16)
        f, mask, above = _step(mask, above, _32)
        bits = (bits & ~f) | ((bits << _32) & f)
        bits = (bits & ~e) | ((bits << _16) & e)
        bits = (bits & ~d) | ((bits << _8) & d)
        bits = (bits & ~c) | ((bits << _4) & c)
        bits = (bits & ~b) | ((bits << _2) & b)
        bits = (bits & ~a) | ((bits << _1) & a)
        out[place] = bits & plane[place]
