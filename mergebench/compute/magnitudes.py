"""Magnitudes as integers, in the same order, and where a rank of them lies by a sample."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.namespace import as_numpy
from mergebench.core.tensor import Array

Ints = NDArray[np.integer[Any]]


def bits(stack: Array) -> NDArray[Any]:
    """Magnitudes as ordered non-negative integers, same shape."""
    kind = np.dtype(f"i{stack.dtype.itemsize}")
    return stack.view(kind) & np.iinfo(kind).max


def magnitudes(stack: Any, kind: np.dtype[Any]) -> Ints:
    """Those of a stack of any library, as integers of a kind."""
    return bits(as_numpy(stack).astype(f"f{kind.itemsize}", copy=False))


def value_of(number: int, kind: np.dtype[Any]) -> float:
    """The magnitude that an integer stands for."""
    return float(np.array([number], kind).view(f"f{kind.itemsize}")[0])


def sample_size(size: int, models: int) -> int:
    """How many entries to sample: the bracket then holds about one entry in a hundred or fewer."""
    return min(max(size // 256, 1 << 16), max((1 << 22) // models, 1 << 16))


def order_statistics(numbers: Ints, places: Sequence[int]) -> list[int]:
    """The non-negative integers at some places of what would be sorted.

    Parameters
    ----------
    numbers : int array, (m,)
    places : sequence of int
        From 0.
    """
    # One count by the upper bits, and what shares them with an answer: a tenth of sorting.
    upper = numbers >> (8 * numbers.itemsize - 16)
    until = np.cumsum(np.bincount(upper))
    found = []
    for place in places:
        chosen = int(np.searchsorted(until, place, side="right"))
        inside = numbers[upper == chosen]
        own = place - int(until[chosen]) + inside.size
        found.append(int(np.partition(inside, own)[own]))
    return found


def brackets(sample: Ints, ranks: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Integers that hold thresholds with near certainty, for every rank a lower and an upper one.

    Parameters
    ----------
    sample : int array, (count,)
        Magnitudes.
    ranks : sequence of int
        Of thresholds, the largest magnitude having 1.
    size : int
        How many magnitudes there are.
    """
    count, top = sample.size, int(np.iinfo(sample.dtype).max)
    ends = []
    for rank in ranks:
        share = rank / size
        # Sampled in runs, entries are not independent: 6 standard deviations rather than 4.
        spread = 6 * sqrt(count * share * (1 - share)) + 2
        ends.append((count - ceil(share * count + spread), count - floor(share * count - spread)))
    places = [each for pair in ends for each in pair if 0 <= each < count]
    known = dict(zip(places, order_statistics(sample, places), strict=True))
    found = [(known.get(low, 1), known.get(high, top)) for low, high in ends]
    return [(max(low, 1), max(high, low, 1)) for low, high in found]
