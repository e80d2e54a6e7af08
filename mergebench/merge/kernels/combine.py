"""The fused pass: from stored entries of base and models to stored entries of the result.

One compiled function works through a list of stages, a stretch of entries at a time that fits the
first cache. Every stage does what its op does in float32, operation by operation in the same order
and without fused multiply-adds, so that no bit differs. What is not finite, on its way in or out,
is only found here: the ops then say what is wrong with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.compute.jit import float_kernel
from mergebench.merge.kernels.codes import (
    BAD_INPUT,
    BAD_OUTPUT,
    DONE,
    GATHER,
    MULTIPLY,
    STRETCH,
    ZEROS,
)
from mergebench.merge.kernels.entries import HIGHEST, gathered, loaded, store
from mergebench.merge.kernels.steps import staged

_1 = np.float32(1)


@float_kernel
def combine(
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
    kind: Any,
    onto: Any,
    out_halves: Any,
    out_words: Any,
) -> Any:
    """Run a list of stages over some entries.

    Parameters
    ----------
    halves, words : uint16 and uint32 array, (rows, …)
        The stored bytes of every model, and of the base in the last row, seen in two ways.
    kinds : int64 array, (rows,)
        Dtypes of the rows.
    minus : int64 array, (models,)
        1 where the base is to be subtracted.
    base : int
        Whether there is one.
    first, count : int
        Index of the first entry in its tensor, and how many there are.
    codes : int64 array, (stages, 4)
        What to do, and up to three numbers. GATHER comes first or not at all.
    ints : int64 array, (stages, models + 2, 2)
    floats : float32 array, (stages, models)
    bounds : float32 array, (stages, models, 4)
        Of windows.
    X : float32 array, (models + SPARE, STRETCH), or as wide as a row that is longer
        Workspace.
    numbers, draws : uint64 and uint32 array
        Workspace for random numbers, seen in two ways.
    along : Along or None
        For stages of rows, of which then no piece cuts one; another function is compiled for it.
    kind : int
        Dtype of the result; ZEROS for float32 rows that are left as they are.
    onto : int
        Whether, and how, the result is added to the base, or to where GATHER has begun.
    out_halves, out_words : uint16 array (count,) and float32 array (rows, count)
        Where the result goes: one of them.

    Returns
    -------
    int
        DONE, BAD_INPUT or BAD_OUTPUT.
    """
    models = minus.shape[0]
    low = X[models]
    stages = codes.shape[0]
    ready = 1 if stages and codes[0, 0] == GATHER else 0
    # What a single model is multiplied by at the end is done while it is stored.
    last = stages - 1 if stages and codes[stages - 1, 0] == MULTIPLY and kind != ZEROS else stages
    by = floats[last, 0] if last < stages else _1
    step = STRETCH
    if along is not None:
        step = max(STRETCH // along.length, 1) * along.length
    for begin in range(0, count, step):
        m = min(step, count - begin)
        here = first + begin
        if ready:
            own, stored = ints[0, :, 0], last == 1 and kind != ZEROS
            flaws = gathered(halves, words, kinds, own, floats[0], X, begin, m, stored)
        else:
            flaws = loaded(halves, words, kinds, minus, base, X, begin, m)
        if flaws & HIGHEST:
            return BAD_INPUT
        rows = 1 if ready else models
        rows = staged(
            codes, ints, floats, bounds, X, rows, here, m, numbers, draws, ready, last, along
        )
        if kind == ZEROS:
            for i in range(rows):
                x, out = X[i], out_words[i, begin:]
                for j in range(m):
                    out[j] = x[j]
            continue
        x, put, out = X[0], out_halves[begin:], out_words[0, begin:]
        if store(x, by, low, onto, kind, put, out, m) & HIGHEST:
            return BAD_OUTPUT
    return DONE
