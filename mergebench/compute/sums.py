"""Sums over a tensor or a model that no tile, thread or order of files can change.

Numbers are summed in float64 over blocks of entries whose places are fixed by the tensor alone, and
the blocks are added up in the order of (tensor name, index).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from mergebench.compute.namespace import namespace

#: Entries summed at once.
BLOCK = 1 << 12

Terms = Callable[[Any, Any], Any]


def totals(sweep: Any, terms: Terms, count: int) -> Any:
    """Sums over all entries of a sweep, one for each row of ``terms``.

    Parameters
    ----------
    sweep : Sweep
    terms : callable
        ``(stack, at) -> array``, (k, m): what is added up, entry by entry, for the entries that
        ``at`` names. Arrays of other libraries than numpy keep their gradients.
    count : int
        The number of rows, k.

    Returns
    -------
    float64 array, (k,)
    """
    total: Any = None
    held: list[Any] = []
    for _, parts in sweep(partial(_look, terms)):
        for part, ends in parts:
            if ends is None:
                total = part if total is None else total + part
                continue
            # What tiles have cut is put together again before it is summed.
            held.append(part)
            if ends:
                block = np.concatenate(held, axis=1).sum(axis=1)
                total = block if total is None else total + block
                held = []
    return np.zeros(count) if total is None else total


def _look(terms: Terms, stack: Any, at: Any) -> list[tuple[Any, bool | None]]:
    """Sums over the whole blocks of a tile, marked ``None``, and the terms of the others.

    The latter are marked by whether their block ends with them.
    """
    xp = namespace(stack)
    found = terms(stack, at)
    if not isinstance(found, np.ndarray):
        return [(xp.sum(xp.astype(found, xp.float64), axis=1), None)]
    wide = found.astype(np.float64)
    parts: list[tuple[Any, bool | None]] = []
    begin = at.start
    while begin < at.stop:
        first = begin // BLOCK * BLOCK
        last = min(first + BLOCK, at.site.size)
        end = min(last, at.stop)
        part = wide[:, begin - at.start : end - at.start]
        if begin == first and end == last:
            # A copy: how numpy adds up must not depend on where the block stands in the tile.
            parts.append((np.ascontiguousarray(part).sum(axis=1), None))
        else:
            parts.append((part.copy(), end == last))
        begin = end
    return parts
