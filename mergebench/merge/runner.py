"""What can run chains on a tensor in the place of the ops on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

from mergebench.compute.spare import Spare
from mergebench.core.tensor import Array


class Runner(Protocol):
    """Compiled passes, or a device; each worker has a room of its own, which only this knows."""

    def tile(self, narrow: int, unit: int) -> int:
        """Entries of a tile of whole units, where the ops are given narrow ones."""
        ...

    def buffers(self, tile: int, spare: Spare) -> Any:
        """Room for one worker, with a ``close`` that gives back what was taken from ``spare``.

        With ``keep=False`` it lets go of that.
        """
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


class Room:
    """What a runner needs for a job of one worker: there only while it is at work.

    Where ops do a part of the job, they take as much memory as it does.

    Parameters
    ----------
    runner : Runner
    size : int
        Entries of its largest tile.
    spare : Spare
    """

    def __init__(self, runner: Runner, size: int, spare: Spare) -> None:
        self._runner, self._size, self._spare = runner, size, spare
        self._buffers: Any = None

    @property
    def buffers(self) -> Any:
        """The runner's own, made when they are asked for."""
        if self._buffers is None:
            self._buffers = self._runner.buffers(self._size, self._spare)
        return self._buffers

    def leave(self) -> None:
        """Make room for ops."""
        if self._buffers is not None:
            self._buffers.close(keep=False)
            self._buffers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._buffers is not None:
            self._buffers.close()
