"""Chains run on a device, tile by tile, in the place of compiled passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergebench.compute.masking import moved
from mergebench.compute.spare import Spare
from mergebench.core.errors import ResourceError
from mergebench.core.tensor import Array
from mergebench.merge.at import At
from mergebench.merge.device.choose import Device
from mergebench.merge.device.lane import STORED, Lane, origin_of
from mergebench.merge.op import Chain

#: ``(ops, at, stack, memo) -> stack``.
Run = Callable[[Chain, At, Any, dict[Chain, Any] | None], Any]
#: ``(start, stop, the base's entries on the device) -> where a tile stands``.
Place = Callable[[int, int, Any], At]
#: A tile for the device is so many of the tiles that fit the caches of a core.
_WIDER = 16


@dataclass(frozen=True, eq=False)
class OnDevice:
    """Chains on one tensor, ready to run on a device.

    Attributes
    ----------
    device : Device
    item : Item of :mod:`mergebench.merge.stream`
    origin : Tensor or None
        What displacements are taken from.
    chains : sequence of Chain
    run, place : callable
    """

    device: Device
    item: Any
    origin: Any
    chains: Sequence[Chain]
    run: Run
    place: Place

    def tile(self, narrow: int, unit: int) -> int:
        """Entries of a tile: transfers are worth it only if they are large."""
        return max(narrow * _WIDER // unit, 1) * unit

    def buffers(self, tile: int, spare: Spare) -> Lane:
        """Room for one worker, pinned and therefore no spare."""
        del spare
        size = min(tile, self.item.site.size)
        return Lane(self.device.name, self.item.deltas, self.origin, size)

    def merge(self, room: Lane, span: tuple[int, int], dtype: str, outs: Sequence[Array]) -> bool:
        """Write merged entries of every chain; false where something is not finite.

        Raises
        ------
        ResourceError
            If the memory of the device runs out.
        """
        with self._advised(span):
            room.read(*span)
            if not room.finite(*room.held):
                return False
            added = None if self.item.base is None else room.base
            memo: dict[Chain, Any] | None = {} if len(self.chains) > 1 else None
            results = []
            with room.working(), torch.no_grad():
                at = self._at(room)
                for ops in self.chains:
                    merged = self.run(ops, at, room.stack, memo)[0]
                    total = merged if added is None else moved(added, merged)
                    results.append(total.to(STORED[dtype]))
            if not room.finite(*results):
                return False
            for found, out in zip(results, outs, strict=True):
                room.fetch(found, out)
        return True

    def looking(self, room: Lane) -> _Looking:
        """What visitors of a sweep can ask of entries that have been read."""
        return _Looking(self, room)

    def stack(self, room: Lane) -> Any:
        """What comes out of the only chain, on the device; ``None`` if an entry is not finite."""
        with self._advised(room.span):
            if not room.finite(*room.held):
                return None
            with room.working(), torch.no_grad():
                found = self.run(self.chains[0], self._at(room), room.stack, None)
            # Visitors know of no streams.
            room.wait()
        return found

    def runs(self, room: Lane, spans: Sequence[tuple[int, int]]) -> None:
        """Left to :meth:`stack`."""

    def _at(self, room: Lane) -> At:
        """Where the entries that were read stand, with what ops look at on the device too."""
        at = self.place(*room.span, room.base)
        base, collected = room.put(at.base), room.put(at.collected)
        return replace(at, base=base, collected=collected)

    @contextmanager
    def _advised(self, span: tuple[int, int]) -> Iterator[None]:
        """Turn a device without memory left into one line."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{self.device.name}: its memory does not hold {span[1] - span[0]} entries of "
                f"{self.item.site.name} in all models",
                fix="free memory there, give a smaller --memory for smaller tiles, or use "
                "--device cpu",
            ) from error


@dataclass(frozen=True, eq=False)
class _Looking:
    """Answers that are small, from entries that stay on the device."""

    tiles: OnDevice
    room: Lane

    def survey(
        self, brackets: Sequence[tuple[int, int, int]]
    ) -> tuple[NDArray[np.int64], list[NDArray[np.int32]], list[NDArray[np.int64]]] | None:
        """As :meth:`mergebench.merge.kernels.running.Looking.survey`."""
        stack = self.tiles.stack(self.room)
        if stack is None:
            return None
        start = self.room.span[0]
        with self.room.working(), torch.no_grad():
            numbers = stack.contiguous().view(torch.int32) & torch.iinfo(torch.int32).max
            tallies, values, places = [], [], []
            for model, low, high in brackets:
                row = numbers[model]
                between = torch.nonzero((row > low) & (row < high)).reshape(-1)
                tallies.append(
                    torch.stack([(row > high).sum(), (row == high).sum(),
                                 torch.tensor(between.numel(), device=row.device),
                                 (row == low).sum()])
                )  # fmt: skip
                values.append(row[between].cpu().numpy())
                places.append(between.cpu().numpy() + start)
            return torch.stack(tallies).cpu().numpy(), values, places

    def products(self) -> None:
        """Left to the visitor, on what is on the device."""

    def ballot(self, rule: str, weights: Sequence[float]) -> None:
        """Left to the visitor, on what is on the device."""


def on_device(
    device: Device, chains: Sequence[Chain], item: Any, run: Run, place: Place
) -> OnDevice | None:
    """The chains on an item of :mod:`mergebench.merge.stream`; ``None`` where it cannot be brought.

    Float64 is left to the processor.
    """
    if item.dtype != np.float32 or item.site.size == 0:
        return None
    try:
        origin = origin_of(item.deltas, item.base)
    except LookupError:
        return None
    return OnDevice(device, item, origin, tuple(chains), run, place)
