"""Where stored entries lie: byte ranges, and what can be said of them before and after reading."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol


class Store(Protocol):
    """What stored bytes are read through: a file here, or one elsewhere.

    Attributes
    ----------
    far : bool
        Whether every byte comes over a network, and none through the page cache.
    """

    far: bool

    def advise(self, offset: int, length: int, advice: str) -> None:
        """Tell that a span is ``"willneed"`` soon, or ``"dontneed"`` any more."""
        ...


class Extent(NamedTuple):
    """``length`` bytes of a store from ``offset`` on."""

    store: Store
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


def extents(tensor: Any, start: int, stop: int) -> Iterable[Extent]:
    """Where entries ``start:stop`` of a flattened tensor lie, as far as it can tell.

    A tensor tells by a method of this name. One whose entries are in memory, computed, or lie in
    another order than its file tells nothing, or only where all of its entries are asked for.
    """
    tell = getattr(tensor, "extents", None)
    return () if tell is None else tell(start, stop)
