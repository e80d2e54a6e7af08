"""Compiled passes over displacements of one tensor.

Some entries of all rows at a time are decoded to float64 in the first cache, the base is
subtracted, and what is asked is added up. :mod:`~mergebench.compute.entrywise` reads them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.compute.entrywise import BF16, F32, F64, LANES, SIZE, STRETCH
from mergebench.compute.jit import as_float, float_kernel, inner

_NONE, _COUNT, _GATHER = range(3)
#: A magnitude's bits that are counted together.
_DIGIT = np.uint64(0xFFFF)


# Loops stand in functions of their own, which makes them three times as fast: only then can the
# compiler tell that what is read and what is written do not overlap.


@inner
def _of_bf16(half: Any) -> Any:
    return np.float64(as_float(np.uint32(np.uint32(half) << np.uint32(16))))


@inner
def _load_bf16(stored: Any, x: Any) -> None:
    for j in range(len(stored)):
        x[j] = _of_bf16(stored[j])


@inner
def _differ_bf16(stored: Any, x: Any, base: Any) -> None:
    for j in range(len(stored)):
        x[j] = _of_bf16(stored[j]) - base[j]


@inner
def _load_f32(stored: Any, x: Any) -> None:
    for j in range(len(stored)):
        x[j] = np.float64(as_float(stored[j]))


@inner
def _differ_f32(stored: Any, x: Any, base: Any) -> None:
    for j in range(len(stored)):
        x[j] = np.float64(as_float(stored[j])) - base[j]


@inner
def _load_f64(stored: Any, x: Any) -> None:
    for j in range(len(stored)):
        x[j] = stored[j]


@inner
def _differ_f64(stored: Any, x: Any, base: Any) -> None:
    for j in range(len(stored)):
        x[j] = stored[j] - base[j]


@inner
def _load(
    halves: Any, words: Any, longs: Any, kinds: Any, minus: Any, begin: Any, m: Any, work: Any
) -> None:
    """Entries ``begin:begin + m`` of every row in float64, zeros behind them."""
    end = begin + m
    for row in range(len(kinds)):
        kind = kinds[row]
        if kind == BF16 and minus[row]:
            _differ_bf16(halves[row, begin:end], work[row], work[0])
        elif kind == BF16:
            _load_bf16(halves[row, begin:end], work[row])
        elif kind == F32 and minus[row]:
            _differ_f32(words[row, begin:end], work[row], work[0])
        elif kind == F32:
            _load_f32(words[row, begin:end], work[row])
        elif kind == F64 and minus[row]:
            _differ_f64(longs[row, begin:end], work[row], work[0])
        elif kind == F64:
            _load_f64(longs[row, begin:end], work[row])
        else:
            work[row, :m] = 0.0
        if m < STRETCH:
            work[row, m:] = 0.0


@inner
def _multiply(a: Any, b: Any, lane: Any) -> None:
    """Add products of entries to their lanes."""
    # One entry of a lane after the other, several at a time in a register.
    for j in range(LANES):
        part = lane[j] + a[j] * b[j]
        part += a[j + LANES] * b[j + LANES]
        part += a[j + 2 * LANES] * b[j + 2 * LANES]
        lane[j] = part + a[j + 3 * LANES] * b[j + 3 * LANES]


@inner
def _signs(x: Any, signs: Any) -> None:
    for j in range(STRETCH):
        signs[j] = np.int8(x[j] > 0) - np.int8(x[j] < 0)


@inner
def _against(one: Any, other: Any) -> Any:
    found = np.int32(0)
    for j in range(STRETCH):
        found += np.int32(np.int8(one[j] * other[j]) < 0)
    return found


@inner
def _both(one: Any, other: Any) -> Any:
    """How many are not zero in both."""
    found = np.int32(0)
    for j in range(STRETCH):
        found += np.int32(np.int8(one[j] * other[j]) != 0)
    return found


@float_kernel
def add(
    halves: Any,
    words: Any,
    longs: Any,
    kinds: Any,
    minus: Any,
    count: Any,
    work: Any,
    pairs: Any,
    lanes: Any,
    sums: Any,
    signed: Any,
    signs: Any,
    conflicts: Any,
) -> None:
    """Inner products, and conflicts of signs, of pairs of rows.

    Parameters
    ----------
    halves … work
        Of :meth:`~mergebench.compute.entrywise.Room.read`.
    pairs : int64 array, (pairs, 2)
    lanes : float64 array of zeros, (pairs, LANES)
        Workspace.
    sums : float64 array, (pairs,)
        Added to.
    signed : int64 array, (signed pairs, 2)
    signs : int8 array, (rows, STRETCH)
        Workspace.
    conflicts : int64 array, (signed pairs, 2)
        Entries of which the signs differ, and entries that neither has at zero; added to.
    """
    for begin in range(0, count, STRETCH):
        m = min(STRETCH, count - begin)
        _load(halves, words, longs, kinds, minus, begin, m, work)
        for pair in range(len(pairs)):
            _multiply(work[pairs[pair, 0]], work[pairs[pair, 1]], lanes[pair])
        if len(signed) == 0:
            continue
        for row in range(len(kinds)):
            _signs(work[row], signs[row])
        for pair in range(len(signed)):
            one, other = signs[signed[pair, 0]], signs[signed[pair, 1]]
            conflicts[pair, 0] += _against(one, other)
            conflicts[pair, 1] += _both(one, other)
    for pair in range(len(pairs)):
        total = 0.0
        for j in range(LANES):
            total += lanes[pair, j]
        sums[pair] += total


@inner
def _strip(keys: Any) -> None:
    """Magnitudes as integers."""
    for j in range(STRETCH):
        keys[j] &= SIZE


@inner
def _moved(keys: Any) -> Any:
    found = np.int64(0)
    for j in range(STRETCH):
        found += np.int64(keys[j] != np.uint64(0))
    return found


@inner
def _count(keys: Any, shift: Any, prefix: Any, below: Any, counts: Any) -> Any:
    """Count digits behind a prefix; the bits below them that any has."""
    rest = np.uint64(0)
    for j in range(len(keys)):
        high = keys[j] >> shift
        if high >> np.uint64(16) == prefix:
            counts[np.int64(high & _DIGIT)] += 1
            rest |= keys[j] & below
    return rest


@inner
def _gather(keys: Any, shift: Any, prefix: Any, values: Any, filled: Any) -> Any:
    some = np.int64(0)
    for j in range(len(keys)):
        some += np.int64(keys[j] >> shift == prefix)
    if some:
        for j in range(len(keys)):
            if keys[j] >> shift == prefix:
                values[filled] = keys[j]
                filled += 1
    return filled


@inner
def _above(keys: Any, threshold: Any, kept: Any) -> Any:
    """Mark what is above a threshold; how many are at it."""
    ties = np.int64(0)
    for j in range(STRETCH):
        kept[j] = np.uint8(keys[j] > threshold)
        ties += np.int64(keys[j] == threshold)
    return ties


@inner
def _first(keys: Any, threshold: Any, kept: Any, left: Any) -> Any:
    """Mark the first that are at a threshold; how many are left to be marked."""
    for j in range(len(keys)):
        if left and keys[j] == threshold:
            kept[j] = np.uint8(1)
            left -= 1
    return left


@inner
def _common(one: Any, other: Any) -> Any:
    found = np.int32(0)
    for j in range(STRETCH):
        found += np.int32(one[j] & other[j])
    return found


@float_kernel
def tally(
    halves: Any,
    words: Any,
    longs: Any,
    kinds: Any,
    minus: Any,
    count: Any,
    work: Any,
    first: Any,
    modes: Any,
    shifts: Any,
    prefixes: Any,
    counts: Any,
    nonzero: Any,
    lower: Any,
    values: Any,
    filled: Any,
) -> None:
    """Count the magnitudes of every displacement by their next 16 bits, or gather them.

    Parameters
    ----------
    halves … work
        As for :func:`add`.
    first : int
        The row of the first displacement.
    modes : int64 array, (models,)
        0: nothing, 1: count, 2: gather.
    shifts, prefixes : uint64 array, (models,)
        Magnitudes are looked at as integers ``key``, and only those with
        ``(key >> shift) >> 16 == prefix``, where they are counted by the digit between; to gather,
        with ``key >> shift == prefix``.
    counts : int64 array, (models, 65536)
    nonzero : int64 array, (models,)
    lower : uint64 array, (models,)
        All bits below the digit that any of them has.
    values : uint64 array, (models, room)
    filled : int64 array, (models,)
    """
    bits = work.view(np.uint64)
    for begin in range(0, count, STRETCH):
        m = min(STRETCH, count - begin)
        _load(halves, words, longs, kinds, minus, begin, m, work)
        for model in range(len(modes)):
            keys, shift, prefix = bits[first + model], shifts[model], prefixes[model]
            _strip(keys)
            if modes[model] == _COUNT:
                below = (np.uint64(1) << shift) - np.uint64(1)
                nonzero[model] += _moved(keys)
                lower[model] |= _count(keys[:m], shift, prefix, below, counts[model])
            elif modes[model] == _GATHER:
                filled[model] = _gather(keys[:m], shift, prefix, values[model], filled[model])


@float_kernel
def settle(
    halves: Any,
    words: Any,
    longs: Any,
    kinds: Any,
    minus: Any,
    count: Any,
    work: Any,
    first: Any,
    thresholds: Any,
    left: Any,
    kept: Any,
    shared: Any,
) -> None:
    """Count entries that several displacements keep: those above a threshold, and the first at it.

    Parameters
    ----------
    halves … first
        As for :func:`tally`.
    thresholds : uint64 array, (models,)
        Magnitudes as integers.
    left : int64 array, (models,)
        How many at the threshold are still to be kept.
    kept : uint8 array, (models, STRETCH)
        Workspace.
    shared : int64 array, (models, models)
        Added to; its diagonal has how many each keeps.
    """
    bits = work.view(np.uint64)
    models = len(thresholds)
    for begin in range(0, count, STRETCH):
        m = min(STRETCH, count - begin)
        _load(halves, words, longs, kinds, minus, begin, m, work)
        for model in range(models):
            keys, threshold = bits[first + model], thresholds[model]
            _strip(keys)
            ties = _above(keys, threshold, kept[model])
            if ties and left[model]:
                left[model] = _first(keys[:m], threshold, kept[model], left[model])
        for one in range(models):
            for other in range(one, models):
                shared[one, other] += _common(kept[one], kept[other])
