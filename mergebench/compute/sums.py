"""Sums over a tensor or a model that no tile, thread or order of files can change.

Numbers are summed in float64 over blocks of entries whose places are fixed by the tensor alone, and
the blocks of a tensor are added up in the order of their index, and then the tensors by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    own, name = _Added(), ""
    for at, parts in sweep(_Look(terms)):
        if at.site.name != name:
            total = _plus(total, own.total)
            own, name = _Added(), at.site.name
        own.add(parts)
    total = _plus(total, own.total)
    return np.zeros(count) if total is None else total


#: Sums over whole blocks of a tensor, marked ``None``, and the terms of others, marked by whether
#: their block ends with them.
Parts = list[tuple[Any, bool | None]]


def _plus(total: Any, part: Any) -> Any:
    return part if total is None else total if part is None else total + part


class _Added:
    """The sum over a tensor as far as it has been seen, and what has been cut from its end."""

    def __init__(self) -> None:
        self.total: Any = None
        self.held: list[Any] = []

    def add(self, parts: Iterable[tuple[Any, bool | None]]) -> None:
        for part, ends in parts:
            if ends is None:
                self.total = _plus(self.total, part)
                continue
            # What tiles have cut is put together again before it is summed.
            self.held.append(part)
            if ends:
                self.total = _plus(self.total, np.concatenate(self.held, axis=1).sum(axis=1))
                self.held = []


@dataclass(frozen=True)
class _Look:
    """Sums over the blocks of a tile, see :func:`_look`."""

    terms: Terms

    def __call__(self, stack: Any, at: Any) -> Parts:
        return _look(self.terms, stack, at)

    def fold(self, parts: Sequence[tuple[int, int, Parts]]) -> Parts:
        """The sum of the beginning of a tensor, and what has been cut from its end."""
        own = _Added()
        for _, _, each in parts:
            own.add(each)
        held: Parts = [(part, False) for part in own.held]
        return held if own.total is None else [(own.total, None), *held]


def _look(terms: Terms, stack: Any, at: Any) -> Parts:
    xp = namespace(stack)
    found = terms(stack, at)
    if not isinstance(found, np.ndarray):
        return [(xp.sum(xp.astype(found, xp.float64), axis=1), None)]
    wide = found.astype(np.float64)
    parts: Parts = []
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
