"""Tensors that are looked at one after the other, once each: what was read is let go of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mergebench.checkpoints import page_cache
from mergebench.compute.machine import PAGE
from mergebench.core.delta import Delta, reads
from mergebench.core.extents import Extent, Store, extents
from mergebench.core.tensor import Tensor, nbytes, size_of

Looked = tuple[Tensor | None, Iterable[Delta | None]]


class Passing:
    """Lets go of tensors in a run that reads more than the page cache should hold.

    The limit is that of merges, see :func:`mergebench.checkpoints.page_cache.limit`; a run below it
    leaves files alone.

    Parameters
    ----------
    everything : iterable of (Tensor or None, deltas)
        All that is looked at: a tensor of the base, and displacements from it.
    """

    def __init__(self, everything: Iterable[Looked]) -> None:
        room = page_cache.limit()
        found = {id(t): t for base, deltas in everything for t in _stored(base, deltas)}
        size = sum(nbytes(each.dtype, each.shape) for each in found.values())
        self._all = list(found.values()) if room is not None and size > room else []

    def done(self, base: Tensor | None, deltas: Iterable[Delta | None]) -> None:
        """Say that nothing of a tensor will be read again."""
        if self._all:
            _let_go(_stored(base, deltas))

    def over(self) -> None:
        """Let go of what was read ahead of other tensors, too: nothing will be read again."""
        _let_go(self._all)


def _let_go(tensors: Iterable[Tensor]) -> None:
    found = (each for t in tensors for each in extents(t, 0, size_of(t.shape)) if each.length)
    stores: dict[Store, list[Extent]] = {}
    for extent in found:
        stores.setdefault(extent.store, []).append(extent)
    for store, own in stores.items():
        for start, stop in _stretches(own):
            store.advise(start, stop - start, "dontneed")


def _stretches(found: list[Extent]) -> Iterator[tuple[int, int]]:
    """Extents that lie side by side as one: the system keeps what reaches beyond an end."""
    found.sort(key=lambda each: each.offset)
    start, stop = found[0].offset, found[0].end
    for each in found[1:]:
        if each.offset > stop + PAGE:
            yield start, stop
            start, stop = each.offset, each.end
        stop = max(stop, each.end)
    yield start, stop


def _stored(base: Tensor | None, deltas: Iterable[Delta | None]) -> list[Tensor]:
    own = [] if base is None else [base]
    return own + [each for delta in deltas if delta is not None for each in reads(delta)]
