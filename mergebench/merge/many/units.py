"""A merge cut into units: tensors that one process works on at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergebench.core.delta import reads
from mergebench.core.tensor import nbytes
from mergebench.merge.plan import Plan

#: Units of a large model: what is lost with a process is at most one of them, and so is what the
#: last process has left to do when the others have finished.
PIECES = 256


@dataclass(frozen=True)
class Unit:
    """Some tensors of a plan, next to each other in the order of names.

    Attributes
    ----------
    number : int
        Its place among the units.
    names : tuple of str
        Of the plan; twins and parts of modules are written with them.
    bytes : int
        What is read for it once, and written.
    """

    number: int
    names: tuple[str, ...]
    bytes: int


def units_of(plan: Plan, pieces: int = PIECES) -> tuple[Unit, ...]:
    """All units, by number: the same for every process that has this plan.

    Parameters
    ----------
    plan : Plan
    pieces : int, default 256
        About how many; a tensor is never cut.
    """
    sizes = {name: _bytes(plan, name) for name in plan.aligned.order}
    least = sum(sizes.values()) / pieces
    units: list[Unit] = []
    names: list[str] = []
    held = 0
    for name in sorted(sizes, key=str.encode):
        names.append(name)
        held += sizes[name]
        if held >= least:
            units.append(Unit(len(units), tuple(names), held))
            names, held = [], 0
    if names:
        units.append(Unit(len(units), tuple(names), held))
    return tuple(units)


def _bytes(plan: Plan, name: str) -> int:
    item = plan.aligned.items.get(name)
    if item is None:
        tensor = plan.aligned.copies[name]
        return nbytes(tensor.dtype, tensor.shape) * (1 + len(plan.variants))
    tensors = {
        id(tensor): tensor for delta in item.deltas if delta is not None for tensor in reads(delta)
    }
    if item.base is not None:
        tensors[id(item.base)] = item.base
    read = sum(nbytes(tensor.dtype, tensor.shape) for tensor in tensors.values())
    return read + item.site.size * item.dtype.itemsize * len(plan.variants)


def owners(units: Sequence[Unit], count: int) -> tuple[int, ...]:
    """Which of ``count`` processes has which unit at first: by bytes, as even as can be."""
    loads = [0] * count
    found = [0] * len(units)
    for unit in sorted(units, key=lambda each: (-each.bytes, each.number)):
        least = loads.index(min(loads))
        found[unit.number] = least
        loads[least] += unit.bytes
    return tuple(found)
