"""Buffers: tensors that no optimiser moves, so that no merge method is for them.

BatchNorm's running statistics are estimates over data, not parameters: scaled, trimmed or elected
they mean nothing, and a variance may become negative. Their weighted mean is what averaging gives
(model soups, arXiv:2203.05482, recompute them afterwards); its weights are never negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.ties import same_content
from mergebench.core.delta import Dense, Difference
from mergebench.core.errors import MismatchError
from mergebench.core.site import is_constant, is_counter, is_statistic
from mergebench.core.tensor import FLOATING, Array, Tensor
from mergebench.merge.align import Aligned
from mergebench.merge.averaged import OWN, Mean, average
from mergebench.merge.item import Item
from mergebench.merge.spaces import Spaces
from mergebench.sources import Source


@dataclass(frozen=True, eq=False)
class _Sum:
    """A base tensor and a stored displacement of it."""

    base: Tensor
    step: Tensor

    @property
    def dtype(self) -> str:
        return "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        wide = self.base.read(start, stop).astype(np.float64)
        return wide + self.step.read(start, stop).astype(np.float64)


def settle(
    aligned: Aligned,
    models: Sequence[Source],
    base: Source | None,
    spaces: Spaces,
    *,
    allow_nonfinite: bool,
    apart: bool = False,
) -> Aligned:
    """Take buffers out of what is merged: statistics are averaged, the rest is the base's.

    Where every model has a result of its own, so are its statistics.

    Parameters
    ----------
    aligned : Aligned
        With every tensor's weights.
    models : sequence of Source, in canonical order
    base : Source or None
        Without it constants are those of the first full model.
    spaces : Spaces
    allow_nonfinite : bool
        Let entries that are not finite pass through, here and in everything that is merged.
    apart : bool
        Whether every model has a result of its own.

    Raises
    ------
    MismatchError
        If an adapter brings other integers than the base has.
    """
    under = None if base is None else base.checkpoint
    first = under or next((m.checkpoint for m in models if m.checkpoint is not None), None)
    items: dict[str, Item] = {}
    copies, reasons = dict(aligned.copies), dict(aligned.reasons)
    notes: list[str] = []
    own: dict[str, tuple[Tensor, ...]] = dict(aligned.own)
    averaged = []
    for name, item in aligned.items.items():
        found: tuple[Tensor, str] | None = None
        if is_statistic(name):
            values = _statistics(item, under, spaces.at(name))
            if values is not None:
                origin = None if under is None else under.tensors.get(name)
                found = average(name, values, origin, lenient=allow_nonfinite)
            if values is not None and found is not None and isinstance(found[0], Mean) and apart:
                own[name] = tuple(found[0].of(label, tensor) for label, _, tensor in values)
                found = found[0], OWN
        elif first is not None and name in first.tensors:
            found = _from_base(item, first, notes)
        if found is None:
            items[name] = replace(item, lenient=allow_nonfinite)
            continue
        copies[name], reasons[name] = found
        if isinstance(found[0], Mean) and name not in own:
            averaged.append(name)
    averaged += [
        name
        for name, tensor in aligned.copies.items()
        if isinstance(tensor, Mean) and is_statistic(name)
    ]
    if averaged:
        notes.append(
            f"{len(averaged)} running statistics ({min(averaged)}, …) are weighted means of the "
            "models': recalibrate them by running training data through the merged model"
        )
    return replace(
        aligned,
        items=items,
        copies=copies,
        reasons=reasons,
        notes=(*aligned.notes, *notes),
        own=own,
    )


def _statistics(
    item: Item, base: Checkpoint | None, space: str
) -> list[tuple[str, float, Tensor]] | None:
    """Label, weight and values of every model; ``None`` where a model has no values of it."""
    origin = None if base is None else base.tensors.get(item.site.name)
    values: list[tuple[str, float, Tensor]] = []
    for label, weight, delta in zip(item.labels, item.weights, item.deltas, strict=True):
        match delta:
            case Difference(finetuned, _):
                values.append((label, weight, finetuned))
            case Dense(tensor) if space == "weight":
                values.append((label, weight, tensor))
            case Dense(tensor) if origin is not None:
                values.append((label, weight, _Sum(origin, tensor)))
            case None if origin is not None:
                values.append((label, weight, origin))
            case _:
                # A displacement without a base stays one.
                return None
    return values


def _from_base(item: Item, first: Checkpoint, notes: list[str]) -> tuple[Tensor, str] | None:
    """Counters, constants and integers, which are the base's."""
    name = item.site.name
    origin = first.tensors[name]
    constant = is_constant(name, item.site.shape)
    if is_counter(name):
        return origin, f"a counter, taken from {first.label}"
    if origin.dtype in FLOATING and not constant:
        return None
    for label, tensor in _values(item):
        if origin.dtype not in FLOATING and not constant and not same_content(origin, tensor):
            raise MismatchError(
                f"{name}: {origin.dtype} tensors are not merged and must agree, but {label} "
                f"differs from {first.label}",
                fix="give models with equal buffers",
            )
        if constant and origin.dtype == tensor.dtype and not same_content(origin, tensor):
            notes.append(f"{name} of {label} differs from that of {first.label}, which is kept")
    return origin, f"a constant, taken from {first.label}"


def _values(item: Item) -> Iterator[tuple[str, Tensor]]:
    for label, delta in zip(item.labels, item.deltas, strict=True):
        match delta:
            case Difference(tensor, _) | Dense(tensor):
                yield label, tensor
            case _:
                continue
