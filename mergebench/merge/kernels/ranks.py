"""Ranks of magnitudes within rows, for the compiled passes, and draws that depend on them.

Entries are put into buckets, as many as there are entries, and what a bucket has mixed up is put in
order. Differences of numbers of 16 bits are coarse, so that little is. Where much is, a radix sort
takes less long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.compute.jit import as_bits, as_float, inner
from mergebench.merge.kernels.codes import DIGITS

_SIZE, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_0, _1 = np.float32(0), np.float32(1)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
#: Rows that are sorted by insertion alone.
_FEW = 16
#: Entries of a sample.
_SAMPLE = 64
#: Entries that are looked at together.
_SOME = 64
#: Moves that a radix sort is worth, beside one for four entries, and rows that then follow it.
_WORTH, _FOLLOW = 256, 15
#: Bits of a digit of the radix sort, and how many digits 31 bits have.
_DIGIT, _TURNS = 11, 3
#: What a number in the lower half of 64 bits is multiplied by to be a share.
_SHARE = 2.0**-32


@inner
def _paired(value: Any, behind: Any) -> Any:
    """Magnitude and place from the end in one integer: equals rank lower the later they come."""
    return (np.uint64(as_bits(value) & _SIZE) << _HALF) | np.uint64(behind)


@inner
def _scales(x: Any, buckets: Any) -> Any:
    """How magnitudes are shared out: ``(split, scale below it, last below it, scale above it)``.

    Three quarters of the buckets are for what is below four times the mean of a sample.
    """
    top = np.int32(0)
    for j in range(len(x)):
        top = max(top, np.int32(as_bits(x[j]) & _SIZE))
    largest, total = as_float(np.uint32(top)), _0
    stride = max(len(x) // _SAMPLE, 1)
    for j in range(_SAMPLE):
        total += abs(x[min(j * stride, len(x) - 1)])
    split, below = total * np.float32(4 / _SAMPLE), buckets - buckets // 4
    if not _0 < split < largest:
        # Zeros share a bucket.
        scale = np.float32(buckets - 1) / largest if top > 0 else _0
        return largest, scale, np.int32(buckets - 1), _0
    scale = np.float32(below - 1) / split
    return split, scale, np.int32(below - 1), np.float32(buckets - below - 1) / (largest - split)


@inner
def _bucketed(x: Any, places: Any, counts: Any, pairs: Any) -> Any:
    """Put pairs into the order of their buckets, and their places in it into ``places``.

    False where magnitudes cannot be shared out.
    """
    n, half = len(x), (len(x) + 1) // 2
    split, lower_scale, border, upper_scale = _scales(x, 2 * half)
    if not (as_bits(lower_scale) < _INFINITE and as_bits(upper_scale) < _INFINITE):
        return False
    last = np.int32(2 * half - 1)
    for j in range(n):
        size = abs(x[j])
        lower = min(np.int32(min(size, split) * lower_scale), border)
        upper = np.int32((max(size, split) - split) * upper_scale)
        places[j] = np.uint32(min(lower + upper, last))
    for bucket in range(2 * half):
        counts[bucket] = np.uint32(0)
    for j in range(n):
        b = np.uint64(places[j])
        counts[b] = np.uint32(counts[b] + np.uint32(1))
    # The running sums of both halves side by side.
    early, late = np.uint32(0), np.uint32(0)
    for bucket in range(half):
        early = np.uint32(early + counts[bucket])
        late = np.uint32(late + counts[bucket + half])
        counts[bucket], counts[bucket + half] = early, late
    for bucket in range(half, 2 * half):
        counts[bucket] = np.uint32(counts[bucket] + early)
    for j in range(n):
        b = np.uint64(places[j])
        place = np.uint32(counts[b] - np.uint32(1))
        counts[b] = places[j] = place
        pairs[np.uint64(place)] = _paired(x[j], n - 1 - j)
    return True


@inner
def _inserted(pairs: Any, places: Any, n: Any, most: Any) -> Any:
    """Sort pairs that are nearly in order, with their places; false after too many moves."""
    moves = 0
    for begin in range(0, n, _SOME):
        first, end = max(begin, 1), min(begin + _SOME, n)
        # From zero on, so that several are compared at once.
        part, mixed = pairs[first - 1 : end], np.uint64(0)
        for r in range(len(part) - 1):
            mixed |= np.uint64(part[r + 1] < part[r])
        if not mixed:
            continue
        for r in range(first, end):
            own, at = pairs[r], r
            while at > 0 and pairs[at - 1] > own:
                moved = pairs[at - 1]
                pairs[at] = moved
                places[n - 1 - np.int64(moved & _LOW)] = np.uint32(at)
                at -= 1
            if at < r:
                pairs[at] = own
                places[n - 1 - np.int64(own & _LOW)] = np.uint32(at)
                moves += r - at
        if moves > most:
            return False
    return True


@inner
def _radix(x: Any, places: Any, counts: Any, pairs: Any, others: Any) -> None:
    """Ranks by three stable passes over eleven bits each."""
    n = len(x)
    for j in range(n):
        pairs[n - 1 - j] = _paired(x[j], n - 1 - j)
    one, two = pairs, others
    for turn in range(_TURNS):
        shift, mask = np.uint64(32 + _DIGIT * turn), np.uint64(DIGITS - 1)
        for digit in range(DIGITS):
            counts[digit] = np.uint32(0)
        for r in range(n):
            b = (one[r] >> shift) & mask
            counts[b] = np.uint32(counts[b] + np.uint32(1))
        total = np.uint32(0)
        for digit in range(DIGITS):
            total = np.uint32(total + counts[digit])
            counts[digit] = np.uint32(total - counts[digit])
        for r in range(n):
            b = (one[r] >> shift) & mask
            place = counts[b]
            counts[b] = np.uint32(place + np.uint32(1))
            two[np.uint64(place)] = one[r]
        one, two = two, one
    for r in range(n):
        places[n - 1 - np.int64(one[r] & _LOW)] = np.uint32(r)


@inner
def ranked(x: Any, places: Any, counts: Any, pairs: Any, hint: Any) -> None:
    """The rank of every magnitude of a row, the smallest being 0, into ``places``.

    Among equals the later entry ranks lower.

    Parameters
    ----------
    x : float32 array, (n,)
    places : uint32 array, (n,)
    counts : uint32 array, (n + 1,) or (2048,), the larger of both
    pairs : uint64 array, (2, n)
    hint : int64 array, (1,)
        For how many more rows buckets are not tried.
    """
    n = len(x)
    if n <= _FEW:
        for j in range(n):
            pairs[0, n - 1 - j] = _paired(x[j], n - 1 - j)
            places[j] = np.uint32(n - 1 - j)
        _inserted(pairs[0], places, n, n * n)
        return
    if hint[0] > 0:
        hint[0] -= 1
    elif _bucketed(x, places, counts, pairs[0]):
        if _inserted(pairs[0], places, n, n // 4 + _WORTH):
            return
        hint[0] = _FOLLOW
    _radix(x, places, counts, pairs[0], pairs[1])


@inner
def draw_by_rank(x: Any, draws: Any, places: Any, least: Any, half: Any, divide: Any) -> None:
    """Keep entries of a row with probabilities from ``least`` to ``least + 2 half``, by rank.

    What stays is divided by its own probability where asked.
    """
    n = len(x)
    steps = np.float64(n - 1)
    for j in range(n):
        chance = least + np.float64(np.int32(places[j])) / steps * 2.0 * half
        kept = x[j] * (_1 if np.float64(draws[j]) * _SHARE < chance else _0)
        x[j] = kept / (np.float32(chance) if divide else _1)


@inner
def draw_rows(
    x: Any,
    length: Any,
    draws: Any,
    numbers: Any,
    divide: Any,
    places: Any,
    counts: Any,
    pairs: Any,
    hint: Any,
    count: Any,
) -> None:
    """:func:`draw_by_rank` for every row, of ``numbers`` least and half."""
    for start in range(0, count, length):
        row = x[start : start + length]
        own = places[:length]
        ranked(row, own, counts, pairs, hint)
        draw_by_rank(row, draws[start:], own, numbers[0], numbers[1], divide)
