"""What displacements of one tensor have to do with each other, entry by entry, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.entrywise import LANES, STRETCH, Passes, Room, Rows

Pairs = Sequence[tuple[int, int]]


def inner_products(
    rows: Rows, pairs: Pairs, signed: Pairs = (), passes: Passes | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Inner products of pairs of rows, and how often their signs conflict, from one reading.

    Pieces are summed and then added up in order, so that a result depends on the tensor alone.
    Compiled passes differ from numpy in the last digits of sums, and in nothing else.

    Parameters
    ----------
    rows : Rows
    pairs, signed : sequences of (row, row)
    passes : Passes, optional
        Compiled passes; numpy without.

    Returns
    -------
    float64 array, (pairs,)
        NaN or infinite where an entry is not finite.
    int64 array, (signed pairs, 2)
        Entries that both rows move in opposite directions, and entries that both move.
    """
    sums, conflicts = np.zeros(len(pairs)), np.zeros((len(signed), 2), np.int64)
    if passes is not None:
        room, wanted, opposed = Room(rows), _places(pairs), _places(signed)
        signs = np.zeros((rows.count, STRETCH), np.int8)
        for start, stop in rows.spans():
            lanes = np.zeros((len(pairs), LANES))
            passes.add(*room.read(start, stop), wanted, lanes, sums, opposed, signs, conflicts)
        return sums, conflicts
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop in rows.spans():
            stack = rows.wide(start, stop)
            for number, (one, other) in enumerate(pairs):
                sums[number] += float(stack[one] @ stack[other])
            if signed:
                sign = (stack > 0).astype(np.int8) - (stack < 0).astype(np.int8)
                for number, (one, other) in enumerate(signed):
                    product = sign[one] * sign[other]
                    found = np.count_nonzero(product < 0), np.count_nonzero(product)
                    conflicts[number] += found
    return sums, conflicts


def _places(pairs: Pairs) -> NDArray[np.int64]:
    return np.array(pairs, np.int64).reshape(-1, 2)


def every_pair(count: int, first: int = 0) -> list[tuple[int, int]]:
    """All pairs of rows from ``first`` on, every row with itself among them."""
    return [(i, j) for i in range(first, count) for j in range(i, count)]


def as_matrix(pairs: Pairs, values: NDArray[Any], count: int) -> NDArray[Any]:
    """The symmetric matrix (count, count) of values of pairs; 0 for the others."""
    found = np.zeros((count, count), values.dtype)
    for (one, other), value in zip(pairs, values, strict=True):
        found[one, other] = found[other, one] = value
    return found
