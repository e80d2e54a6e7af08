"""Thresholds of rows, for the compiled passes: the exact k-th magnitude of each, and its ties.

A row stays in the first caches, so it is counted rather than partitioned: how many magnitudes reach
a pivot, the least of those and the greatest of the others. Pivots begin where the threshold of the
row before was, and a handful of counts settle a row; what they settle does not depend on them.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np

from mergebench.compute.jit import as_bits, as_float, inner
from mergebench.merge.kernels.codes import FEW
from mergebench.merge.kernels.masks import window

_SIZE = np.uint32(0x7FFFFFFF)
_0, _1, _BELOW, _ENDLESS = np.float32(0), np.float32(1), np.float32(-1), np.float32(inf)
_NONE, _ALL = np.int32(-1), np.int32(0x7FFFFFFF)
#: The largest finite magnitude, and one to begin with, as integers.
_LARGEST, _USUAL = np.int64(0x7F7FFFFF), np.int64(0x3A800000)
#: Entries that are counted at once.
_SOME = 256


@inner
def _around(x: Any, pivot: Any) -> Any:
    """How many magnitudes reach a pivot, the least of them, and the greatest of the others."""
    count, least, most = np.int32(0), _ALL, _NONE
    for j in range(len(x)):
        size = np.int32(as_bits(x[j]) & _SIZE)
        there = size >= pivot
        count += np.int32(there)
        least = min(least, size if there else _ALL)
        most = max(most, _NONE if there else size)
    return np.int64(count), np.int64(least), np.int64(most)


@inner
def _kth(x: Any, rank: Any, hint: Any) -> Any:
    """The ``rank``-th largest magnitude as an integer, and how many entries equal to it stay.

    More than there are, where all do. ``hint`` has the threshold of the row before, or 0, and by
    how many sixteenths of an integer thresholds move from one rank to the next.
    """
    low, high = np.int64(0), _LARGEST
    reach, above = np.int64(len(x)), np.int64(0)
    begin = pivot = hint[0] if hint[0] > 0 else _USUAL
    value, stay, off, turn = np.int64(0), np.int64(0), np.int64(0), 0
    while True:
        count, least, most = _around(x, np.int32(pivot))
        off = count - rank if turn == 0 else off
        if count == rank:
            value, stay = least, np.int64(len(x))
            break
        if count > rank:
            low, reach = least, count
        else:
            high, above = most, count
        if low >= high:
            value, stay = high, rank - above
            break
        if turn == 0 and hint[1] > 0:
            pivot = begin + off * hint[1] // 16
        elif turn % 4 == 3:
            # Halved now and then, so that no row takes many turns.
            pivot = low + (high - low + 1) // 2
        else:
            share = np.float64(reach - rank) / np.float64(reach - above)
            pivot = low + 1 + np.int64(np.float64(high - low) * share)
        pivot = min(max(pivot, low + 1), high)
        turn += 1
    if abs(off) > 1:
        hint[1] = max((hint[1] + 16 * (value - begin) // off) // 2, 1)
    hint[0] = value
    return value, stay


@inner
def _behind(x: Any, value: Any, stay: Any) -> Any:
    """The place behind so many entries of a magnitude."""
    for begin in range(0, len(x), _SOME):
        part = x[begin : min(begin + _SOME, len(x))]
        here = np.int32(0)
        for j in range(len(part)):
            here += np.int32(np.int32(as_bits(part[j]) & _SIZE) == value)
        if here < stay:
            stay -= here
            continue
        for j in range(len(part)):
            stay -= np.int32(as_bits(part[j]) & _SIZE) == value
            if stay == 0:
                return begin + j + 1
    return len(x)


@inner
def _limits(x: Any, rank: Any, ties: Any, hint: Any) -> Any:
    """What the ``rank`` largest magnitudes are above, before a place and from there on."""
    if rank >= len(x):
        return _BELOW, _BELOW, len(x)
    if rank <= 0:
        return _ENDLESS, _ENDLESS, 0
    value, stay = _kth(x, rank, hint)
    threshold = as_float(np.uint32(value))
    below = as_float(np.uint32(value - 1)) if value > 0 else _BELOW
    all_stay = ties or stay >= len(x)
    return below, threshold, len(x) if all_stay else _behind(x, np.int32(value), stay)


@inner
def _few(x: Any, low: Any, high: Any, ties: Any, sizes: Any) -> None:
    """As :func:`window_rows`, for one short row."""
    for j in range(len(x)):
        sizes[j] = np.int64(as_bits(x[j]) & _SIZE)
    for j in range(len(x)):
        larger, before = 0, 0
        for i in range(len(x)):
            larger += sizes[i] > sizes[j]
            before += (sizes[i] == sizes[j]) & (i < j)
        rank = larger + before
        stays = (larger if ties else rank) < high
        x[j] = x[j] * (_1 if stays & (rank >= low) else _0)


@inner
def window_rows(
    x: Any, length: Any, low: Any, high: Any, ties: Any, hints: Any, sizes: Any, count: Any
) -> None:
    """Keep in every row the magnitudes of rank ``low < rank <= high``, the largest being the first.

    The earlier of equals ranks first; with ``ties`` all equals of the last that stays do too.
    ``hints`` has two numbers for either rank, and ``sizes`` is room for a short row.
    """
    for start in range(0, count, length):
        row = x[start : start + length]
        if length <= FEW:
            _few(row, low, high, ties, sizes)
            continue
        least, least_late, keep = _limits(row, high, ties, hints[1])
        most, most_late, drop = _ENDLESS, _ENDLESS, 0
        if low > 0:
            most, most_late, drop = _limits(row, low, False, hints[0])
        window(row, least, least_late, most, most_late, keep, drop, length)
