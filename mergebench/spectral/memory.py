"""What looking at one tensor takes, from its shape and what is asked of it alone."""

from __future__ import annotations

from collections.abc import Sequence

from mergebench.compute.spectra import svd_bytes
from mergebench.core.delta import Delta, LowRank
from mergebench.spectral.diagnostic import Diagnostic
from mergebench.spectral.spectrum import sides
from mergebench.spectral.subjects import Subject

#: Pieces of entries, and what else a worker holds.
_ENTRIES = 16 << 20
#: What the search for a threshold takes per model: magnitudes in its bracket, and counts.
_SEARCH = 10 << 20
#: Freed arrays of such sizes may stay with the allocators of threads, a few at a time.
_RETAINED = 16 << 20
_FULL = ("base.svd", "base.top", "tuned.svd", "tuned.top")


def job_bytes(
    subject: Subject, chosen: Sequence[Diagnostic], models: int, keeps: bool = False
) -> int:
    """Anonymous memory of one job, at most.

    Parameters
    ----------
    subject : Subject
    chosen : sequence of Diagnostic
    models : int
        How many are looked at.
    keeps : bool, default False
        Whether decompositions of the base are kept, and therefore made in full.
    """
    streamed = _ENTRIES + max(
        (_SEARCH * models for each in chosen if _is_streamed(each)), default=0
    )
    matrices = [each for each in chosen if each.on == "matrix" and not _is_streamed(each)]
    if not subject.matrix or not matrices:
        return streamed if subject.matrix else _ENTRIES
    rows, columns = sides(subject.site)
    size, thin = 8 * rows * columns, 4 * (rows + columns) * min(rows, columns)
    uses = frozenset[str]().union(*(each.uses for each in matrices))
    on_base = any(not use.startswith("delta") for use in uses)
    dense = not all(_is_thin(delta, rows, columns) for delta in subject.deltas.values())
    # W0, W and the vectors of their decompositions stay while others are made.
    held = 2 * size * on_base + thin * (on_base + any(use in uses for use in _FULL[2:]))
    if "delta.svd" in uses:
        held += sum(_vectors(delta, rows, columns) for delta in subject.deltas.values())
    full = any(use in uses for use in _FULL) or (keeps and on_base)
    full = full or (dense and "delta.svd" in uses)
    computing = size
    if full:
        computing += svd_bytes(rows, columns)
    elif on_base or dense:
        computing += 3 * size
    if any(each.per == "site" for each in matrices) and dense:
        computing += 2 * size
    work = max(each.work(rows, columns, models) for each in matrices)
    return max(_ENTRIES + held + max(computing, work) + 4 * min(size, _RETAINED), streamed)


def _is_streamed(each: Diagnostic) -> bool:
    return each.uses == frozenset({"entries"})


def _is_thin(delta: Delta, rows: int, columns: int) -> bool:
    return isinstance(delta, LowRank) and delta.rank < min(rows, columns)


def _vectors(delta: Delta, rows: int, columns: int) -> int:
    if isinstance(delta, LowRank) and delta.rank < min(rows, columns):
        return 8 * 3 * (rows + columns) * delta.rank
    return 4 * (rows + columns) * min(rows, columns)
