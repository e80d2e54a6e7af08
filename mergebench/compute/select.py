"""The exact k-th magnitude of many entries, without sorting or keeping them.

A sample brackets the threshold; one sweep counts what lies above the bracket and at its ends, and
gathers what lies inside; the answer is checked against the counts and the bracket widened or
narrowed until it is exact. Magnitudes are compared as integers (the bits of a non-negative float
are ordered).
Ties are broken by (tensor name as bytes, flat index), so *exactly* k entries are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from mergebench.compute.cut import ALL, NONE, Cut
from mergebench.compute.magnitudes import bits, brackets, sample_size
from mergebench.compute.namespace import as_numpy
from mergebench.compute.search import BINS, Search, Tie
from mergebench.compute.survey import Locate, Survey
from mergebench.core.tensor import Array

#: Entries gathered, over all thresholds, before brackets are narrowed instead. An entry takes
#: 12 bytes (16 in float64), so a search stays below 64 MiB.
CAPACITY = 1 << 22

R = TypeVar("R")


def kth_magnitudes(sweep: Any, ranks: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """For every model, the cuts that keep exactly its ``rank`` largest magnitudes.

    Parameters
    ----------
    sweep : Sweep
        Gives stacks of shape ``(models, m)``, float32 or float64, without NaN.
    ranks : sequence per model of int
        How many entries to keep; 0 keeps none, the size of the scope or more keeps all.

    Returns
    -------
    list per model of Cut, in the order of ``ranks``
    """
    size = sweep.size
    found: list[list[Cut | None]] = [
        [NONE if rank <= 0 else ALL if rank >= size else None for rank in each] for each in ranks
    ]
    open_places = [
        (model, place)
        for model, row in enumerate(found)
        for place, cut in enumerate(row)
        if cut is None
    ]
    if not open_places:
        return [[cut for cut in row if cut is not None] for row in found]
    targets = _targets(sweep, [(model, ranks[model][place]) for model, place in open_places])
    while pending := [target for target in targets if target.cut is None]:
        for target in pending:
            target.start_round()
        for at, parts in sweep(Survey(pending, size)):
            for target, part in zip(pending, parts, strict=True):
                target.take(at, part)
        concluded = _each(sweep, [target.conclude for target in pending])
        if ties := [tie for tie in concluded if tie is not None]:
            _settle(sweep, ties)
    for (model, place), target in zip(open_places, targets, strict=True):
        found[model][place] = target.cut
    return [[cut for cut in row if cut is not None] for row in found]


def _settle(sweep: Any, ties: Sequence[Tie]) -> None:
    spans = {(each.name, each.start, each.stop) for each in ties}
    # Sweeps that cannot look at some entries again look at all of them.
    again = getattr(sweep, "again", None)
    looked = sweep(Locate(ties)) if again is None else again(Locate(ties), spans)
    left = [each.wanted for each in ties]
    for _, found in looked:
        for number, places in found:
            if 0 < left[number] <= places.size:
                ties[number].settle(int(places[left[number] - 1]))
            left[number] -= places.size


def _each(sweep: Any, jobs: Sequence[Callable[[], R]]) -> list[R]:
    """Results of jobs, on as many threads as the sweep has."""
    run = getattr(sweep, "each_job", None)
    return [job() for job in jobs] if run is None else list(run(jobs))


def _targets(sweep: Any, wanted: Sequence[tuple[int, int]]) -> list[Search]:
    capacity = max(CAPACITY // len(wanted), 1 << 16)
    if sweep.size <= BINS:
        # Small enough to be gathered whole.
        kind = bits(as_numpy(sweep.sample(1))).dtype
        top = int(np.iinfo(kind).max)
        return [Search(model, rank, 1, top, kind, capacity) for model, rank in wanted]
    sample = as_numpy(sweep.sample(sample_size(sweep.size, sweep.models)))
    ranks: dict[int, list[int]] = {}
    for model, rank in wanted:
        ranks.setdefault(model, []).append(rank)
    jobs = [partial(_brackets, sample[model], own, sweep.size) for model, own in ranks.items()]
    found = dict(zip(ranks, map(iter, _each(sweep, jobs)), strict=True))
    kind = np.dtype(f"i{sample.dtype.itemsize}")
    return [Search(model, rank, *next(found[model]), kind, capacity) for model, rank in wanted]


def _brackets(sample: Array, ranks: Sequence[int], size: int) -> list[tuple[int, int]]:
    return brackets(bits(sample), ranks, size)
