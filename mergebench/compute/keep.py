"""Which entries a threshold keeps, with exact tie rules, over any array library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    low, high = max(low, 0), min(high, row)
    thresholds = _thresholds(magnitudes, [rank for rank in (low, high) if 0 < rank < row])
    mask = _top(magnitudes, high, thresholds)
    if low > 0:
        mask = mask & ~_top(magnitudes, low, thresholds)
    return xp.reshape(mask, stack.shape)


def _thresholds(magnitudes: Any, ranks: Sequence[int]) -> dict[int, Any]:
    """The ``rank``-th largest of every row, shape (rows, 1), for several ranks at once."""
    row = magnitudes.shape[1]
    found: dict[int, Any] = {}
    if not isinstance(magnitudes, np.ndarray):
        ordered = namespace(magnitudes).sort(magnitudes, axis=1) if ranks else magnitudes
        return {rank: ordered[:, row - rank : row - rank + 1] for rank in ranks}
    upper = magnitudes
    # Each partition leaves the larger entries at the end, where the next, smaller rank lies.
    for rank in sorted(set(ranks), reverse=True):
        place = upper.shape[1] - rank
        upper = np.partition(upper, place, axis=1)[:, place:]
        found[rank] = upper[:, :1]
    return found


def _top(magnitudes: Any, count: int, thresholds: Mapping[int, Any]) -> Any:
    """True for exactly the ``count`` largest of every row of a 2-D array."""
    xp = namespace(magnitudes)
    if count >= magnitudes.shape[1]:
        return xp.ones_like(magnitudes, dtype=xp.bool)
    if count <= 0:
        return xp.zeros_like(magnitudes, dtype=xp.bool)
    threshold = thresholds[count]
    top = magnitudes >= threshold
    surplus = xp.count_nonzero(top, axis=1) > count
    (tied,) = xp.nonzero(surplus)
    if tied.shape[0]:
        # Only the rows that have more candidates than places are decided entry by entry.
        lines = magnitudes[tied, :]
        above, equal = lines > threshold[tied, :], lines == threshold[tied, :]
        free = count - xp.count_nonzero(above, axis=1)[:, None]
        order = xp.cumulative_sum(xp.astype(equal, xp.int32), axis=1)
        top[tied, :] = above | (equal & (order <= free))
    return top
