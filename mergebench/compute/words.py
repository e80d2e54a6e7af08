"""Codes for bits of which few are set: words of a parse tree, each with a prefix code.

Bits are cut into the words of a Tunstall tree (Tunstall 1967), which are about equally likely, and
words are coded by a Huffman code (Huffman 1952). Both follow from the share of set bits by
arithmetic on integers, so that a file need name no more than one of 59 classes of shares, and a
decoder builds the same tables anywhere. One look into a table of 4096 then yields 10 to 100 bits,
at 0.2 to 0.4 % above the entropy.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

#: Longest code of a word, in bits: decoders look at so many at once.
LOOK = 12
#: Classes of shares: class c stands for a share of 2^(-1 - c/4) set bits.
CLASSES = range(1, 60)
_WORDS = 1 << 10
_LONGEST, _PATTERN = 1023, 32
# 2^31 · 2^(-j/4), rounded.
_ROOTS = (2147483648, 1805811301, 1518500250, 1276901417)
_STEP = 8


def share_of(number: int) -> float:
    """The share of set bits that a class stands for."""
    return float(2.0 ** (-1 - number / 4))


def class_of(ones: int, size: int) -> int:
    """The class for ``ones`` set bits of ``size``, at most half of them; 0 for about half."""
    if not ones:
        return CLASSES[-1]
    return min(round(-4 * float(np.log2(2 * ones / size))), CLASSES[-1])


def words_of(number: int) -> list[tuple[int, int, int]]:
    """Weight, length and bits (the first is the lowest) of the words of a class, by falling weight.

    From the empty word of weight 2^62 on, the word of largest weight (of these the shortest, then
    the smallest as a number) is replaced by itself with a 0 and with a 1 at its end, until there
    are 1024; the one with a 1 takes ⌊weight · P / 2^32⌋ of its weight, and the one with a 0 the
    rest. A word of 1023 bits stays, and so does one of 32 bits from its first 1 to its end.
    """
    ones = _ROOTS[number % 4] >> (number // 4)
    done: list[tuple[int, int, int]] = []
    heap = [(-(1 << 62), 0, 0)]
    while heap and len(heap) + len(done) < _WORDS:
        weight, length, bits = heapq.heappop(heap)
        if length == _LONGEST or (bits and length - _zeros(bits) == _PATTERN):
            done.append((weight, length, bits))
            continue
        part = (-weight * ones) >> 32
        heapq.heappush(heap, (weight + part, length + 1, bits))
        heapq.heappush(heap, (-part, length + 1, bits | (1 << length)))
    return [(-weight, length, bits) for weight, length, bits in sorted(heap + done)]


def _zeros(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def code_lengths(weights: list[int]) -> list[int]:
    """Lengths of a Huffman code of at most 12 bits.

    The two smallest weights (of equal ones the earlier) are joined until one is left. Where a code
    is longer than 12 bits, weights are raised to at least 2^40, 2^41, … until none is.
    """
    floor = 1 << 40
    own = list(weights)
    while True:
        count = len(own)
        heap = [(weight, place) for place, weight in enumerate(own)]
        heapq.heapify(heap)
        above = [0] * (2 * count - 1)
        for joined in range(count, 2 * count - 1):
            (one, left), (two, right) = heapq.heappop(heap), heapq.heappop(heap)
            above[left] = above[right] = joined
            heapq.heappush(heap, (one + two, joined))
        depth = [0] * (2 * count - 1)
        for place in range(2 * count - 3, -1, -1):
            depth[place] = depth[above[place]] + 1
        if max(depth[:count]) <= LOOK:
            return depth[:count]
        own = [max(weight, floor) for weight in weights]
        floor *= 2


@dataclass(frozen=True, eq=False)
class Code:
    """The tables of one class.

    Attributes
    ----------
    look : uint64 array, (4096,)
        By the next 12 bits of a stream: bits 0-3 the length of the code, 4-13 that of the word,
        14-23 the zeros at its start, 32-63 its bits from there.
    longest : int
        Bits of the longest word.
    tree : uint32 array, (tables · 256,)
        By the next 8 bits of what is coded, from a table on: bit 31 set: a word ends, bits 0-3 the
        length of its code, 4-15 the code, 16-25 the length of the word; else the next table.
    """

    look: NDArray[np.uint64]
    longest: int
    tree: NDArray[np.uint32]


@lru_cache(maxsize=len(CLASSES))
def code_of(number: int) -> Code:
    """The tables of a class, made once: about 10 ms and 0.5 MB."""
    words = words_of(number)
    lengths = code_lengths([weight for weight, _, _ in words])
    look = np.zeros(1 << LOOK, np.uint64)
    codes: dict[tuple[int, int], tuple[int, int]] = {}
    following = 0
    before = 0
    for place in sorted(range(len(words)), key=lambda each: (lengths[each], each)):
        size = lengths[place]
        following <<= size - before
        before = size
        # Codes are counted from their highest bit, and stored from there.
        code = int(f"{following:0{size}b}"[::-1], 2)
        following += 1
        _, length, bits = words[place]
        codes[length, bits] = size, code
        skip = _zeros(bits) if bits else 0
        entry = size | length << 4 | skip << 14 | (bits >> skip) << 32
        look[code :: 1 << size] = entry
    return Code(look, max(length for _, length, _ in words), _tree(codes))


def _tree(codes: dict[tuple[int, int], tuple[int, int]]) -> NDArray[np.uint32]:
    """Tables that find the word at the start of some bits, 8 bits a step."""
    inner = {(0, 0)}
    for length, bits in codes:
        inner |= {(cut, bits & ((1 << cut) - 1)) for cut in range(_STEP, length, _STEP)}
    number = {node: place for place, node in enumerate(sorted(inner))}
    tables = np.zeros((len(number), 1 << _STEP), np.uint32)
    for (length, bits), place in number.items():
        if length:
            cut = length - _STEP
            tables[number[cut, bits & ((1 << cut) - 1)], bits >> cut] = place
    for (length, bits), (size, code) in codes.items():
        cut = (length - 1) // _STEP * _STEP
        place = number[cut, bits & ((1 << cut) - 1)]
        entry = 1 << 31 | size | code << 4 | length << 16
        tables[place, bits >> cut :: 1 << (length - cut)] = entry
    return tables.reshape(-1)
