"""Grouping by similarity: agglomeration over many blocks at once, down to a size."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

#: How alike two groups are: as their least alike members, as all pairs on average, or as the most
#: alike ones.
Linkage = Literal["complete", "average", "single"]
_STEPS = 2.0**40
_PAIRS: Mapping[str, Callable[[Any], Any]] = {
    "complete": np.min,
    "average": np.mean,
    "single": np.max,
}


def cosines(products: Any) -> Any:
    """Cosines of vectors from their inner products, (n, n), float64.

    Two zero vectors are alike (1); a zero and another one are at right angles. Cosines are
    multiples of 2⁻⁴⁰, so that equal ones do not differ by how sums were rounded.
    """
    norms = np.sqrt(np.diagonal(products))
    empty = norms == 0
    safe = np.where(empty, 1.0, norms)
    found = products / safe[:, None] / safe[None, :]
    found[np.ix_(empty, empty)] = 1.0
    return np.round(found * _STEPS) / _STEPS


def grouped(
    likeness: Mapping[str, Any],
    sizes: Mapping[str, int],
    most: float,
    linkage: Linkage,
    order: Sequence[Any],
) -> dict[str, tuple[int, ...]]:
    """Group the models of every block until all groups together are small enough.

    In every step the two most alike groups of one block become one, whichever block that is.
    Among equals the block whose name comes first is taken, then the models first in ``order``.

    Parameters
    ----------
    likeness : mapping of block to array (n, n)
        Of all pairs of models.
    sizes : mapping of block to int
        What one group of a block takes.
    most : float
        What all may take; groups are made while they take more and there are two to merge.
    linkage : complete, average or single
    order : sequence of n keys
        Sorts the models, so that their places do not matter.

    Returns
    -------
    dict of block to tuple of n ints
        For every model the first model, in ``order``, of its group.
    """
    places = sorted(range(len(order)), key=order.__getitem__)
    blocks = {name: [[place] for place in places] for name in sorted(likeness)}
    total = sum(sizes[name] * len(groups) for name, groups in blocks.items())
    queue = [
        entry
        for name, groups in blocks.items()
        if (entry := _best(name, groups, likeness, linkage))
    ]
    heapq.heapify(queue)
    while queue and total > most:
        _, name, one, other = heapq.heappop(queue)
        groups = blocks[name]
        groups[one] = groups[one] + groups.pop(other)
        total -= sizes[name]
        if entry := _best(name, groups, likeness, linkage):
            heapq.heappush(queue, entry)
    found = {}
    for name, groups in blocks.items():
        first = {place: min(each, key=places.index) for each in groups for place in each}
        found[name] = tuple(first[place] for place in range(len(places)))
    return found


def _best(
    name: str, groups: list[list[int]], likeness: Mapping[str, Any], linkage: Linkage
) -> tuple[float, str, int, int] | None:
    """The two most alike groups of a block, the most alike first in a heap."""
    table, measure = likeness[name], _PAIRS[linkage]
    pairs = [
        (
            -float(measure(table[np.ix_(sorted(groups[one]), sorted(groups[other]))])),
            name,
            one,
            other,
        )
        for one in range(len(groups))
        for other in range(one + 1, len(groups))
    ]
    return min(pairs, default=None)
