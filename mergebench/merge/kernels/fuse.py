"""Recognising chains that the compiled pass can run on a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mergebench.compute.spare import Spare
from mergebench.compute.tiles import least_room
from mergebench.core.tensor import Array
from mergebench.merge.at import At
from mergebench.merge.kernels import codes as c
from mergebench.merge.kernels.program import Program, program
from mergebench.merge.kernels.running import Buffers, Kernels, Looking
from mergebench.merge.kernels.stages import Stage
from mergebench.merge.kernels.stored import Stored, stored
from mergebench.merge.op import Chain

#: ``(ops up to and including one that measures) -> what it has measured``.
Known = Callable[[Chain], Any]


def staged(ops: Chain, at: At, known: Known) -> tuple[Stage, ...] | None:
    """A chain in stages for one tensor; ``None`` if an op has none.

    Parameters
    ----------
    ops : Chain
    at : At
        All entries of the tensor.
    known : callable
    """
    stages: list[Stage] = []
    beginning = at
    for end, each in enumerate(ops, start=1):
        value = known(ops[:end]) if each.statistic is not None else None
        own = each.stages(replace(at, value=value))
        if own is None:
            return None
        stages += own
        at = at.after(each, beginning)
    return tuple(stages)


@dataclass(frozen=True, eq=False)
class Fused:
    """Chains on one tensor, ready to run on its stored entries.

    Attributes
    ----------
    source : Stored
    programs : sequence of Program
        One for each chain.
    kernels : Kernels
    """

    source: Stored
    programs: Sequence[Program]
    kernels: Kernels

    def tile(self, narrow: int, unit: int) -> int:
        """Entries of a tile that takes no more room than the ops take for a narrow one.

        Every tile costs a tenth of a millisecond besides its entries. None is less than a unit.
        """
        width = len(self.source.rows) * max(self.source.width, 2)
        # A power of two, since jobs are.
        most = (least_room(self.source.models) // width).bit_length() - 1
        return max((narrow << max(most, 0)) // unit, 1) * unit

    def buffers(self, tile: int, spare: Spare) -> Buffers:
        """Room for one worker."""
        return Buffers(self.source, tile, self.programs, spare)

    def merge(
        self, room: Buffers, span: tuple[int, int], dtype: str, outs: Sequence[Array]
    ) -> bool:
        """Write merged entries of every chain; false where the ops have to."""
        room.read(*span)
        return all(
            room.merge(self.kernels, each, dtype, out)
            for each, out in zip(self.programs, outs, strict=True)
        )

    def looking(self, room: Buffers) -> Looking:
        """What visitors can ask of entries that have been read, after the only chain."""
        return Looking(room, self.kernels, self.programs[0])

    def stack(self, room: Buffers) -> Array | None:
        """The same entries as float32; ``None`` where the ops have to."""
        return room.stack(self.kernels, self.programs[0])

    def runs(self, room: Buffers, spans: Sequence[tuple[int, int]]) -> Array | None:
        """What it gives for runs of entries, side by side.

        ``None`` too after stages, which look at where entries are.
        """
        if self.programs[0].codes.size:
            return None
        room.gather(spans)
        return self.stack(room)


def fuse(
    chains: Sequence[Chain],
    item: Any,
    known: Known,
    kernels: Callable[[bool], Kernels | None],
    *,
    ends: bool,
) -> Fused | None:
    """The chains on an item of :mod:`mergebench.merge.stream`; ``None`` if one cannot be fused.

    Chains that are not at their ends give rows, and nothing is added to a base. ``kernels`` gives
    the compiled pass with or without stages of rows.
    """
    if item.dtype != np.float32:
        return None
    source = stored(item.site, item.deltas, item.base)
    if source is None:
        return None
    found: list[Program] = []
    for ops in chains:
        stages = staged(ops, item.at(0, item.site.size), known)
        if stages is None:
            return None
        found.append(
            program(
                stages,
                source.models,
                item.site,
                rows=source.alike,
                onto=None if not ends else c.NOWHERE if item.base is None else c.EXACTLY,
            )
        )
    # What has stages of rows may stand beside what has none.
    every = [kernels(rows) for rows in {each.row > 0 for each in found}]
    compiled = every[0]
    return None if compiled is None or None in every else Fused(source, found, compiled)


def fits(dtype: str) -> bool:
    """Whether results can be stored so by the compiled pass."""
    return bool(dtype) and dtype in c.KINDS
