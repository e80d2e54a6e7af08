"""What stages do to a stretch of float32 rows, for the compiled passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.compute.jit import inner
from mergebench.merge.kernels.codes import (
    ADD,
    DISJOINT,
    DIVIDE,
    DRAW,
    ELECT,
    MULTIPLY,
    ROW_DRAW,
    ROW_WINDOW,
    STEP,
    WINDOW,
)
from mergebench.merge.kernels.elections import disjoint, elect, elected_signs
from mergebench.merge.kernels.masks import chosen, random_words, window
from mergebench.merge.kernels.ranks import draw_rows
from mergebench.merge.kernels.thresholds import window_rows

_0, _1 = np.float32(0), np.float32(1)


@inner
def _times(x: Any, by: Any, count: Any) -> None:
    for j in range(count):
        x[j] = x[j] * by


@inner
def _over(x: Any, by: Any, count: Any) -> None:
    for j in range(count):
        x[j] = x[j] / by


@inner
def _add(X: Any, rows: Any, weights: Any, count: Any) -> None:
    total, w = X[0], weights[0]
    if rows == 1:
        _times(total, w, count)
    for i in range(1, rows):
        x, v = X[i], weights[i]
        if i == 1:
            for j in range(count):
                total[j] = total[j] * w + x[j] * v
        else:
            for j in range(count):
                total[j] = total[j] + x[j] * v


@inner
def _step(X: Any, own: Any, shares: Any, step: Any, exact: Any, count: Any) -> None:
    """``own`` has the pivot, how many others there are, and which."""
    start = X[own[0]]
    for place in range(own[1]):
        x, share = X[own[2 + place]], shares[place]
        if place == 0:
            for j in range(count):
                step[j] = (x[j] - start[j]) * share
        else:
            for j in range(count):
                step[j] = step[j] + (x[j] - start[j]) * share
    out = X[0]
    if own[1] == 0:
        for j in range(count):
            out[j] = start[j]
    elif exact:
        for j in range(count):
            out[j] = start[j] if step[j] == _0 else start[j] + step[j]
    else:
        for j in range(count):
            out[j] = start[j] + step[j]


@inner
def staged(
    codes: Any,
    ints: Any,
    floats: Any,
    bounds: Any,
    X: Any,
    rows: Any,
    here: Any,
    m: Any,
    numbers: Any,
    draws: Any,
    start: Any,
    stop: Any,
    along: Any,
) -> Any:
    """Run stages ``start:stop`` on the first ``rows`` rows; how many are left.

    The others are those of :func:`combine`, for ``m`` entries of the tensor from ``here`` on.
    """
    one, two = X[X.shape[0] - 2], X[X.shape[0] - 1]
    # An election that a mean comes behind is held in one go with it.
    elected = -1
    for stage in range(start, stop):
        code, a, b = codes[stage, 0], codes[stage, 1], codes[stage, 2]
        own = floats[stage]
        if code == WINDOW:
            for i in range(rows):
                edges, ties = bounds[stage, i], ints[stage, i]
                keep = min(max(ties[0] - here, 0), m)
                drop = min(max(ties[1] - here, 0), m)
                window(X[i], edges[0], edges[1], edges[2], edges[3], keep, drop, m)
        elif code in (DRAW, ROW_DRAW):
            word = here // 2
            for i in range(rows):
                stream, most = np.uint64(ints[stage, i, 0]), np.uint32(ints[stage, i, 1])
                random_words(stream, word, (here + m + 1) // 2 - word, numbers)
                own_draws = draws[here - 2 * word :]
                if code == DRAW:
                    chosen(X[i], own_draws, most, m)
                elif along is not None:
                    draw_rows(
                        X[i], along.length, own_draws, along.chances[stage, i], a,
                        along.places, along.counts, along.pairs, along.hints[stage, i, 0], m,
                    )  # fmt: skip
        elif code == ROW_WINDOW:
            if along is not None:
                for i in range(rows):
                    ranks, ties, hints = ints[stage, i], own[i] > _0, along.hints[stage, i]
                    window_rows(X[i], along.length, ranks[0], ranks[1], ties, hints, along.sizes, m)
        elif code == MULTIPLY:
            for i in range(rows):
                _times(X[i], own[i], m)
        elif code == DIVIDE:
            for i in range(rows):
                _over(X[i], own[i], m)
        elif code == ELECT:
            if stage + 1 < stop and codes[stage + 1, 0] == DISJOINT:
                elected = stage
                elected_signs(X, rows, one, own, a, b, m)
            else:
                elect(X, rows, one, own, a, b, m)
        elif code == ADD:
            _add(X, rows, own, m)
            rows = 1
        elif code == STEP:
            _step(X, ints[stage, :, 0], own, one, a, m)
            rows = 1
        elif code == DISJOINT:
            votes, how = floats[max(elected, 0)], codes[max(elected, 0), 1]
            disjoint(X, rows, votes, how, one, elected >= 0, own, a, b, two, m)
            rows = 1
    return rows
