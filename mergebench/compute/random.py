"""Counter-based random numbers: entry i of a stream is a function of the stream and i alone.

SplitMix64 (Steele, Lea and Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014):
output ``j`` of stream ``s`` is ``mix(s + (j + 1)·φ mod 2^64)``. Nothing is carried from one number
to the next, so tiles, threads and the order of models cannot change a number. Numbers are made by
numpy, and moved to where they are compared: all array libraries see the same ones.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PHI = np.uint64(0x9E3779B97F4A7C15)
#: Shifts and factors of the mixing function, in turns; a shift comes last.
_MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)), (31, None))


def stream_of(*parts: int) -> int:
    """64 bits that name a stream, from integers such as a seed, a tensor's and a model's key."""
    text = ",".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def words(stream: int, start: int, stop: int) -> NDArray[np.uint64]:
    """Numbers ``start:stop`` of a stream, 64 random bits each, shape ``(stop - start,)``."""
    found = np.arange(start + 1, stop + 1, dtype=np.uint64)
    found *= _PHI
    found += np.uint64(stream)
    shifted = np.empty_like(found)
    for shift, factor in _MIX:
        np.right_shift(found, np.uint64(shift), out=shifted)
        found ^= shifted
        if factor is not None:
            found *= factor
    return found


def draws(stream: int, start: int, stop: int) -> NDArray[np.uint32]:
    """Uniform integers in [0, 2^32) for entries ``start:stop``, shape ``(stop - start,)``.

    Entries 2j and 2j + 1 have the lower and the upper half of word j.
    """
    first = start // 2
    halves = words(stream, first, (stop + 1) // 2).astype("<u8", copy=False).view("<u4")
    return halves[start - 2 * first : stop - 2 * first].astype(np.uint32, copy=False)


def chosen(stream: int, start: int, stop: int, probability: float) -> NDArray[np.bool_]:
    """True for each of the entries ``start:stop`` with a probability, to 2^-33.

    Of two probabilities the larger one chooses all that the smaller one does, and more.
    """
    below = limit(probability)
    if below >= 1 << 32:
        return np.ones(stop - start, np.bool_)
    return draws(stream, start, stop) < np.uint32(below)


def limit(probability: float) -> int:
    """What a draw must be below to happen with a probability, at most 2^32."""
    return round(probability * 2.0**32)


def parts(stream: int, start: int, stop: int, count: int) -> NDArray[np.int64]:
    """Which of ``count`` parts each of the entries ``start:stop`` is in, shape ``(stop-start,)``.

    All parts are equally likely, to 2^-32; ``count`` is at most 2^16.
    """
    return (draws(stream, start, stop).astype(np.int64) * count) >> 32


def as_shares(numbers: NDArray[np.uint32]) -> NDArray[Any]:
    """Draws as float64 numbers in [0, 1); ``share < p`` holds with probability p."""
    return numbers * 2.0**-32
