"""Which entries a threshold keeps, with exact tie rules, over any array library."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mergebench.compute.cut import Cut
from mergebench.compute.namespace import namespace


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
        if not _single(cut.value):
            # Found among float64 tensors: rounded to float32 it would tie with its neighbours.
            magnitudes = xp.astype(magnitudes, xp.float64, copy=False)
        ties = cut.ties_until(name, start, start + length)
        if ties == length:
            rows.append(magnitudes >= cut.value)
        elif ties == 0:
            rows.append(magnitudes > cut.value)
        else:
            rows.append(xp.concat([magnitudes[:ties] >= cut.value, magnitudes[ties:] > cut.value]))
    return xp.stack(rows)


def _single(value: float) -> bool:
    """Whether float32 holds a number as it is."""
    with np.errstate(over="ignore"):
        return float(np.float32(value)) == value


def row_ranks_mask(stack: Any, row: int, low: int, high: int, ties: bool = False) -> Any:
    """True where the magnitude's rank within its row is in ``low < rank <= high``.

    Rank 1 is the largest; among equals the earlier entry ranks first. With ``ties`` all equals of
    the last one that stays do too.

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
    if stack.shape[1] == 0:
        return xp.ones_like(stack, dtype=xp.bool)
    magnitudes = xp.reshape(xp.abs(stack), (-1, row))
    low, high = max(low, 0), min(high, row)
    thresholds = _thresholds(magnitudes, {rank for rank in (low, high) if 0 < rank < row})
    mask = _top(magnitudes, high, thresholds, ties)
    if low > 0:
        mask = mask & ~_top(magnitudes, low, thresholds)
    return xp.reshape(mask, stack.shape)


def _thresholds(magnitudes: Any, ranks: Collection[int]) -> dict[int, tuple[Any, Any]]:
    """Per rank the ``rank``-th largest of every row, (rows, 1), and how many ties of it stay."""
    xp = namespace(magnitudes)
    found: dict[int, tuple[Any, Any]] = {}
    upper = magnitudes
    # Each partition leaves the larger entries at the end, where the next, smaller rank lies.
    for rank in sorted(ranks, reverse=True):
        place = upper.shape[1] - rank
        if isinstance(upper, np.ndarray):
            upper = np.partition(upper, place, axis=1)[:, place:]
        else:
            upper = xp.sort(upper, axis=1)[:, place:]
        threshold = upper[:, :1]
        found[rank] = threshold, rank - xp.count_nonzero(upper > threshold, axis=1)
    return found


def _top(
    magnitudes: Any, count: int, thresholds: Mapping[int, tuple[Any, Any]], ties: bool = False
) -> Any:
    """True for exactly the ``count`` largest of every row of a 2-D array, or with all ties."""
    xp = namespace(magnitudes)
    if count >= magnitudes.shape[1]:
        return xp.ones_like(magnitudes, dtype=xp.bool)
    if count <= 0:
        return xp.zeros_like(magnitudes, dtype=xp.bool)
    threshold, free = thresholds[count]
    top = magnitudes >= threshold
    if ties:
        return top
    rows, columns = xp.nonzero(magnitudes == threshold)
    # Row by row, so the place of a tie within its row is its distance from the row's first.
    places = xp.arange(rows.shape[0], dtype=rows.dtype, device=rows.device) - xp.searchsorted(
        rows, rows
    )
    late = places >= free[rows]
    top[rows[late], columns[late]] = False
    return top
