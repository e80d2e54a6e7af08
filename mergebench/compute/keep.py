"""Which entries a threshold keeps, with exact tie rules, over any array library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergebench.compute.namespace import namespace
from mergebench.compute.select import Cut


def keep_mask(stack: Any, cuts: Sequence[Cut], name: str, start: int) -> Any:
    """True where the cut of each model keeps the entry.

    Parameters
    ----------
    stack : array, (n, m)
        Entries ``start : start + m`` of the flattened tensor ``name``.
    cuts : sequence of n Cut

    Returns
    -------
    array of bool, (n, m)
    """
    xp = namespace(stack)
    length = stack.shape[1]
    rows = []
    for model, cut in enumerate(cuts):
        magnitudes = xp.abs(stack[model, :])
        ties = cut.ties_until(name, start, start + length)
        if ties == length:
            rows.append(magnitudes >= cut.value)
        elif ties == 0:
            rows.append(magnitudes > cut.value)
        else:
            rows.append(xp.concat([magnitudes[:ties] >= cut.value, magnitudes[ties:] > cut.value]))
    return xp.stack(rows)


def row_ranks_mask(stack: Any, row: int, low: int, high: int) -> Any:
    """True where the magnitude's rank within its row is in ``low < rank <= high``.

    Rank 1 is the largest; among equals the earlier entry ranks first.

    Parameters
    ----------
    stack : array, (n, rows · row)
    row : int
        Length of a row.

    Returns
    -------
    array of bool, same shape
    """
    xp = namespace(stack)
    magnitudes = xp.reshape(xp.abs(stack), (-1, row))
    inside = _top(magnitudes, high)
    if low > 0:
        inside = inside & ~_top(magnitudes, low)
    return xp.reshape(inside, stack.shape)


def _top(magnitudes: Any, count: int) -> Any:
    """True for exactly the ``count`` largest of every row of a 2-D array."""
    xp = namespace(magnitudes)
    row = magnitudes.shape[1]
    if count >= row:
        return xp.ones_like(magnitudes, dtype=xp.bool)
    if count <= 0:
        return xp.zeros_like(magnitudes, dtype=xp.bool)
    threshold = _kth(magnitudes, row - count)
    top = magnitudes >= threshold
    surplus = xp.sum(xp.astype(top, xp.int64), axis=1) - count
    tied = np.flatnonzero(np.asarray(surplus.tolist()))
    for index in map(int, tied):
        # Rows with ties at the threshold are few, so each is mended by itself.
        line = magnitudes[index, :]
        equal = xp.nonzero(line == threshold[index, 0])[0]
        top[index, equal[equal.shape[0] - int(surplus[index]) :]] = False
    return top


def _kth(magnitudes: Any, index: int) -> Any:
    """The ``index``-th smallest of every row, shape (rows, 1)."""
    if isinstance(magnitudes, np.ndarray):
        return np.partition(magnitudes, index, axis=1)[:, index : index + 1]
    return namespace(magnitudes).sort(magnitudes, axis=1)[:, index : index + 1]
