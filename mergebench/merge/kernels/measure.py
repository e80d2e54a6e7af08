"""The fused pass that measures: magnitudes around thresholds, inner products, votes.

As :mod:`mergebench.merge.kernels.combine`, whose stages come first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.compute.jit import as_bits, float_kernel, inner, lowest, ones, reaching
from mergebench.merge.kernels.codes import (
    BAD_INPUT,
    BALLOT,
    BF16,
    BLOCK,
    DONE,
    LANES,
    PRODUCTS,
    SOME,
    STRETCH,
    SURVEY,
)
from mergebench.merge.kernels.elections import total_votes
from mergebench.merge.kernels.entries import HIGHEST, SIZE, loaded, widened
from mergebench.merge.kernels.steps import staged

_0, _1 = np.float32(0), np.int64(1)


@inner
def _survey(
    x: Any, low: Any, high: Any, tally: Any, values: Any, places: Any, first: Any, count: Any
) -> None:
    """Count magnitudes above, at the ends of, and inside a bracket; gather those inside."""
    room, full = values.shape[0] - SOME, ~np.uint64(0)
    for begin in range(0, count, SOME):
        left = count - begin
        these = full if left >= SOME else (np.uint64(1) << np.uint64(left)) - np.uint64(1)
        over = reaching(x, begin, np.uint32(high + _1)) & these
        upper = reaching(x, begin, np.uint32(high)) & these
        to_low = reaching(x, begin, np.uint32(low + _1)) & these
        lower = reaching(x, begin, np.uint32(low)) & these
        inside, at, here = to_low & ~upper, tally[2], first + begin
        tally[0] += ones(over)
        tally[1] += ones(upper & ~over)
        tally[2] += ones(inside)
        tally[3] += ones(lower & ~to_low)
        if at > room:
            continue
        while inside:
            j = lowest(inside)
            values[at] = np.int32(as_bits(x[begin + j]) & SIZE)
            places[at] = here + j
            at += 1
            inside &= inside - np.uint64(1)


@inner
def _as_it_is(value: Any) -> Any:
    return np.float64(value)


@inner
def _from_bf16(half: Any) -> Any:
    return np.float64(widened(half))


@inner
def _products_of_two(x: Any, y: Any, wide: Any, lanes: Any, count: Any) -> None:
    """As :func:`_products` of two rows, without copies of them in float64."""
    xx, xy, yy = lanes[0], lanes[1], lanes[2]
    for begin in range(0, count, 4 * LANES):
        p, q = x[begin : begin + 4 * LANES], y[begin : begin + 4 * LANES]
        for j in range(LANES):
            a, b = wide(p[j]), wide(q[j])
            c, d = wide(p[j + LANES]), wide(q[j + LANES])
            e, f = wide(p[j + 2 * LANES]), wide(q[j + 2 * LANES])
            g, h = wide(p[j + 3 * LANES]), wide(q[j + 3 * LANES])
            xx[j] = (((xx[j] + a * a) + c * c) + e * e) + g * g
            xy[j] = (((xy[j] + a * b) + c * d) + e * f) + g * h
            yy[j] = (((yy[j] + b * b) + d * d) + f * f) + h * h


@inner
def _products(X: Any, rows: Any, wide: Any, lanes: Any, count: Any) -> None:
    """Add products of all pairs of rows to their lanes, in float64."""
    step, done = wide.shape[1], 0
    if rows == 2:
        done = count // step * step
        _products_of_two(X[0], X[1], _as_it_is, lanes, done)
    for begin in range(done, count, step):
        m = min(step, count - begin)
        for i in range(rows):
            x, w = X[i, begin : begin + m], wide[i]
            for j in range(m):
                w[j] = np.float64(x[j])
        # Zeros change no sum.
        for i in range(rows):
            for j in range(m, step):
                wide[i, j] = 0.0
        pair = 0
        for i in range(rows):
            for k in range(i, rows):
                a, b, lane = wide[i], wide[k], lanes[pair]
                # One entry of a lane after the other, several at a time in a register.
                for j in range(LANES):
                    part = lane[j] + a[j] * b[j]
                    part += a[j + LANES] * b[j + LANES]
                    part += a[j + 2 * LANES] * b[j + 2 * LANES]
                    lane[j] = part + a[j + 3 * LANES] * b[j + 3 * LANES]
                pair += 1


@inner
def _folded(lane: Any) -> Any:
    """The sum of the lanes: the upper half onto the lower, until one is left."""
    half = LANES // 2
    while half > 0:
        for j in range(half):
            lane[j] += lane[j + half]
        half //= 2
    return lane[0]


@float_kernel
def measure(
    halves: Any,
    words: Any,
    kinds: Any,
    minus: Any,
    base: Any,
    first: Any,
    count: Any,
    codes: Any,
    ints: Any,
    floats: Any,
    bounds: Any,
    X: Any,
    numbers: Any,
    draws: Any,
    along: Any,
    what: Any,
    how: Any,
    weights: Any,
    brackets: Any,
    tallies: Any,
    values: Any,
    places: Any,
    wide: Any,
    lanes: Any,
    sums: Any,
) -> Any:
    """Run stages over some entries, and look at what they leave.

    Parameters
    ----------
    halves … along
        As for :func:`~mergebench.merge.kernels.combine.combine`.
    what : int
        SURVEY, PRODUCTS or BALLOT.
    how, weights : int, float32 array
        Of a BALLOT, as ELECT has them.
    brackets : int64 array, (searches, 3)
        Of a SURVEY: the row, and the least and the largest magnitude as integers.
    tallies : int64 array of zeros, (searches, 4)
        How many entries are above, at the upper end, inside, and at the lower end; of a BALLOT
        how many more are elected positive than negative.
    values, places : int32 and int64 array, (searches, room)
        What lies inside, as long as there is room for SOME more, and where in the tensor.
    wide, lanes, sums : float64 array, (rows, 4 · LANES), (pairs, LANES) and (blocks, pairs)
        Workspace and result of PRODUCTS, for entries that begin with a block and no stages of
        rows.

    Returns
    -------
    int
        DONE or BAD_INPUT.
    """
    # A zero as such would have the stages compiled once more.
    none = np.int64(0)
    step = STRETCH
    if along is not None:
        step = max(STRETCH // along.length, 1) * along.length
    # Two rows of bfloat16 are multiplied as they are; what is not finite makes its square so.
    bare = what == PRODUCTS and len(codes) == 0 and minus.shape[0] == 2 and not base
    bare = bare and kinds[0] == BF16 and kinds[1] == BF16
    for begin in range(0, count, step):
        m = min(step, count - begin)
        here, rows = first + begin, minus.shape[0]
        stored = bare and m % (4 * LANES) == 0
        if not stored:
            if loaded(halves, words, kinds, minus, base, X, begin, m) & HIGHEST:
                return BAD_INPUT
            rows = staged(
                codes, ints, floats, bounds, X, rows,
                here, m, numbers, draws, none, len(codes), along,
            )  # fmt: skip
        if what == SURVEY:
            for search in range(len(brackets)):
                own = brackets[search]
                tally, value, place = tallies[search], values[search], places[search]
                _survey(X[own[0]], own[1], own[2], tally, value, place, here, m)
        elif what == PRODUCTS:
            if begin % BLOCK == 0:
                lanes[:] = 0.0
            if stored:
                x, y = halves[0, begin:], halves[1, begin:]
                _products_of_two(x, y, _from_bf16, lanes, m)
            else:
                _products(X, rows, wide, lanes, m)
            if (begin + m) % BLOCK == 0 or begin + m == count:
                for pair in range(len(lanes)):
                    sums[begin // BLOCK, pair] = _folded(lanes[pair])
                if bare and not np.isfinite(sums[begin // BLOCK, 0] + sums[begin // BLOCK, 2]):
                    return BAD_INPUT
        elif what == BALLOT:
            total = X[minus.shape[0] + 1]
            total_votes(X, rows, total, weights, how, m)
            plus, minus_ = 0, 0
            for j in range(m):
                plus += total[j] > _0
                minus_ += total[j] < _0
            tallies[0, 0] += plus - minus_
    return DONE
