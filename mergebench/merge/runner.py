"""What can run chains on a tensor in the place of the ops on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mergebench.compute.spare import Spare
from mergebench.core.tensor import Array


class Runner(Protocol):
    """Compiled passes, or a device; each worker has a room of its own, which only this knows."""

    def tile(self, narrow: int, unit: int) -> int:
        """Entries of a tile of whole units, where the ops are given narrow ones."""
        ...

    def buffers(self, tile: int, spare: Spare) -> Any:
        """Room for one worker, with a ``close`` that gives back what was taken from ``spare``."""
        ...

    def merge(self, room: Any, span: tuple[int, int], dtype: str, outs: Sequence[Array]) -> bool:
        """Write merged entries of every chain in a stored dtype; false where the ops have to."""
        ...

    def looking(self, room: Any) -> Any:
        """What visitors of a sweep can ask of entries that have been read."""
        ...

    def stack(self, room: Any) -> Any:
        """The same entries after the only chain; ``None`` where the ops have to."""
        ...

    def runs(self, room: Any, spans: Sequence[tuple[int, int]]) -> Any:
        """What :meth:`stack` gives for runs of entries, side by side; ``None`` where it has to."""
        ...
