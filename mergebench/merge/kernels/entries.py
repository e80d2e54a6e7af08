"""Stored entries to float32 and back, one after the other, for the compiled passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.compute.jit import as_bits, as_float, inner
from mergebench.merge.kernels.codes import BF16, EXACTLY, F16, F32, PLAINLY, SPARE, ZEROS

SIZE, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
#: Set where an entry is not finite.
HIGHEST = np.uint32(0x80000000)
_0, _1 = np.float32(0), np.float32(1)
#: From the exponents of float16 to those of float32.
_HALF_UP = np.float32(2.0**112)


@inner
def widened(half: Any) -> Any:
    """A bfloat16 as float32, exactly."""
    return as_float(np.uint32(np.uint32(half) << np.uint32(16)))


@inner
def _half(h: Any) -> Any:
    """A float16 as float32, exactly."""
    size = (np.uint32(h) & np.uint32(0x7FFF)) << np.uint32(13)
    value = as_bits(as_float(np.uint32(size)) * _HALF_UP)
    endless = _INFINITE if size >= np.uint32(0x0F800000) else np.uint32(0)
    sign = (np.uint32(h) & np.uint32(0x8000)) << np.uint32(16)
    return as_float(np.uint32(value | endless | sign))


@inner
def _flaw(value: Any) -> Any:
    """A number whose highest bit tells whether a value is not finite."""
    return np.uint32((as_bits(value) & SIZE) + np.uint32(0x00800000))


@inner
def load(halves: Any, words: Any, kind: Any, x: Any, count: Any) -> Any:
    """Stored entries as float32, exactly; the highest bit of the result is for flaws."""
    flaws = np.uint32(0)
    if kind == BF16:
        for j in range(count):
            x[j] = widened(halves[j])
            flaws |= _flaw(x[j])
    elif kind == F16:
        for j in range(count):
            x[j] = _half(halves[j])
            flaws |= _flaw(x[j])
    elif kind == F32:
        for j in range(count):
            x[j] = as_float(words[j])
            flaws |= _flaw(x[j])
    else:
        for j in range(count):
            x[j] = _0
    return flaws


@inner
def _expand(halves: Any, x: Any, count: Any) -> None:
    """The same of bfloat16, where flaws are found later."""
    for j in range(count):
        x[j] = widened(halves[j])


@inner
def differ(halves: Any, words: Any, kind: Any, base: Any, x: Any, count: Any) -> Any:
    """As :func:`load`, with the base subtracted."""
    flaws = np.uint32(0)
    if kind == BF16:
        for j in range(count):
            value = widened(halves[j]) - base[j]
            x[j] = value
            flaws |= _flaw(value)
    elif kind == F16:
        for j in range(count):
            value = _half(halves[j]) - base[j]
            x[j] = value
            flaws |= _flaw(value)
    else:
        for j in range(count):
            value = as_float(words[j]) - base[j]
            x[j] = value
            flaws |= _flaw(value)
    return flaws


@inner
def _to_bf16(value: Any) -> Any:
    """Bits of a size rounded to bfloat16, in the upper half; beyond infinity for NaN."""
    # Without the sign, which a NaN would be carried into on its way to zero.
    size = np.uint32(as_bits(value) & SIZE)
    odd = (size >> np.uint32(16)) & np.uint32(1)
    return np.uint32(size + np.uint32(0x7FFF) + odd)


@inner
def _signed(size: Any, value: Any) -> Any:
    return np.uint16((size | (as_bits(value) & HIGHEST)) >> np.uint32(16))


@inner
def _to_half(value: Any) -> Any:
    bits = as_bits(value)
    size = np.uint32(bits & SIZE)
    odd = (size >> np.uint32(13)) & np.uint32(1)
    large = np.uint32(size + np.uint32(0xC8000FFF) + odd) >> np.uint32(13)
    # Added to a number whose last place is that of the smallest halves.
    small = as_bits(as_float(size) + np.float32(0.5)) - np.uint32(0x3F000000)
    found = np.uint32(small) if size < np.uint32(0x38800000) else np.uint32(large)
    found = found if size < np.uint32(0x47800000) else np.uint32(0x7C00)
    return np.uint32(found | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@inner
def _accumulate(halves: Any, words: Any, kind: Any, low: Any, weight: Any, total: Any) -> None:
    """Add ``(stored - low) · weight`` to a total."""
    if kind == BF16:
        for j in range(len(total)):
            value = widened(halves[j]) - low[j]
            total[j] = total[j] + value * weight
    elif kind == F16:
        for j in range(len(total)):
            total[j] = total[j] + (_half(halves[j]) - low[j]) * weight
    else:
        for j in range(len(total)):
            total[j] = total[j] + (as_float(words[j]) - low[j]) * weight


@inner
def _accumulate_two(halves: Any, own: Any, begin: Any, low: Any, weights: Any, total: Any) -> None:
    """The same of two rows of bfloat16, one after the other for each entry."""
    a, b = halves[own[0], begin:], halves[own[1], begin:]
    v, w = weights[0], weights[1]
    for j in range(len(total)):
        base = low[j]
        one = widened(a[j]) - base
        two = widened(b[j]) - base
        total[j] = (total[j] + one * v) + two * w


@inner
def _accumulate_three(
    halves: Any, own: Any, begin: Any, low: Any, weights: Any, total: Any
) -> None:
    """The same of three."""
    a, b, c = halves[own[0], begin:], halves[own[1], begin:], halves[own[2], begin:]
    u, v, w = weights[0], weights[1], weights[2]
    for j in range(len(total)):
        base = low[j]
        one = widened(a[j]) - base
        two = widened(b[j]) - base
        three = widened(c[j]) - base
        total[j] = ((total[j] + one * u) + two * v) + three * w


@inner
def _alike(kinds: Any, own: Any, place: Any) -> Any:
    """How many rows of bfloat16 come next, up to three."""
    found = 0
    while found < 3 and place + found < own[1] and kinds[own[2 + place + found]] == BF16:
        found += 1
    return found


@inner
def _landed(low: Any, step: Any) -> Any:
    """A step onto the base, whose bits stay where the step is zero."""
    return low if step == _0 else low + step


@inner
def store(
    x: Any, by: Any, low: Any, onto: Any, kind: Any, halves: Any, out: Any, count: Any
) -> Any:
    """``x · by``, onto the base if asked, rounded to nearest even; flaws as above."""
    flaws = np.uint32(0)
    if kind == BF16 and onto == EXACTLY:
        for j in range(count):
            value = _landed(low[j], x[j] * by)
            found = _to_bf16(value)
            halves[j] = _signed(found, value)
            flaws |= np.uint32(found + np.uint32(0x00800000))
        return flaws
    if onto == EXACTLY:
        for j in range(count):
            x[j] = _landed(low[j], x[j] * by)
    elif onto == PLAINLY:
        for j in range(count):
            x[j] = low[j] + x[j] * by
    by = _1 if onto else by
    if kind == BF16:
        for j in range(count):
            value = x[j] * by
            found = _to_bf16(value)
            halves[j] = _signed(found, value)
            flaws |= np.uint32(found + np.uint32(0x00800000))
    elif kind == F16:
        for j in range(count):
            found = _to_half(x[j] * by)
            halves[j] = np.uint16(found)
            flaws |= np.uint32((found & np.uint32(0x7FFF)) + np.uint32(0x400)) << np.uint32(16)
    else:
        for j in range(count):
            out[j] = x[j] * by
            flaws |= _flaw(out[j])
    return flaws


@inner
def loaded(
    halves: Any, words: Any, kinds: Any, minus: Any, base: Any, X: Any, begin: Any, count: Any
) -> Any:
    """All rows as float32, displacements from the base where asked; flaws as above."""
    models, flaws = minus.shape[0], np.uint32(0)
    low = X[models]
    if base:
        flaws |= load(halves[models, begin:], words[models, begin:], kinds[models], low, count)
    for i in range(models):
        if minus[i]:
            flaws |= differ(halves[i, begin:], words[i, begin:], kinds[i], low, X[i], count)
        else:
            flaws |= load(halves[i, begin:], words[i, begin:], kinds[i], X[i], count)
    return flaws


@inner
def gathered(
    halves: Any,
    words: Any,
    kinds: Any,
    own: Any,
    weights: Any,
    X: Any,
    begin: Any,
    count: Any,
    stored: Any,
) -> Any:
    """The weighted sum of displacements of rows from another, or from zero.

    ``own`` has the row that is left, how many others there are, and which; flaws as above. If the
    sum is ``stored`` as it is, all of them are found there.
    """
    total, low, flaws = X[0, :count], X[X.shape[0] - SPARE], np.uint32(0)
    if kinds[own[0]] == ZEROS:
        low[:count] = _0
    elif stored and kinds[own[0]] == BF16:
        _expand(halves[own[0], begin:], low, count)
    else:
        flaws |= load(halves[own[0], begin:], words[own[0], begin:], kinds[own[0]], low, count)
    # The only number that changes nothing it is added to, negative zeros included.
    total[:] = -_0
    place = 0
    while place < own[1]:
        some, rows, w = _alike(kinds, own, place), own[2 + place :], weights[place:]
        if some == 3:
            _accumulate_three(halves, rows, begin, low, w, total)
        elif some == 2:
            _accumulate_two(halves, rows, begin, low, w, total)
        else:
            i, some = rows[0], 1
            _accumulate(halves[i, begin:], words[i, begin:], kinds[i], low, w[0], total)
        place += some
    if stored:
        return np.uint32(0)
    # What is not finite stays so, whatever is added to it.
    for j in range(count):
        flaws |= _flaw(total[j])
    return flaws
