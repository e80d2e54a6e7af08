"""Tensors that models hold in full and that no base has: heads, counters, statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.ties import same_content
from mergebench.core.delta import Delta
from mergebench.core.errors import MismatchError
from mergebench.core.site import is_counter, is_statistic
from mergebench.core.tensor import Tensor
from mergebench.merge.averaged import average
from mergebench.sources import Source


@dataclass(eq=False)
class Table:
    """Work in progress of :func:`align`."""

    models: Sequence[Source]
    weights: tuple[float, ...]
    base: Checkpoint | None
    deltas: dict[str, list[Delta | None]] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    kept: dict[str, list[tuple[str, Tensor]]] = field(default_factory=dict)


def check_added(table: Table, reference: Checkpoint | None) -> None:
    """A tensor that the base lacks (a new head) must be in every full model, or in none."""
    full = [m for m in table.models if m.checkpoint is not None]
    for name, given in table.kept.items():
        holders = {label for label, _ in given}
        for model in full:
            assert model.checkpoint is not None
            if name in model.checkpoint.tensors or reference is model.checkpoint:
                continue
            if any(name in m.checkpoint.tensors for m in full if m.checkpoint is not None):
                raise MismatchError(
                    f"{name}: is in {min(holders)}, but neither in {model.label} nor in "
                    f"{reference.label if reference else 'a base'}",
                    fix="give models with the same heads, or a base that has them",
                )


def own_values(table: Table) -> dict[str, tuple[Tensor, ...]]:
    """What every model holds in full and no base has, such as a head: one value per model."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, given in table.kept.items():
        values = tuple(tensor for _, tensor in given)
        kinds = {(tensor.dtype, tuple(tensor.shape)) for tensor in values}
        differ = any(not same_content(values[0], tensor) for tensor in values[1:])
        plain = not is_statistic(name) and not is_counter(name)
        if plain and differ and len(kinds) == 1 and len(values) == len(table.models):
            found[name] = values
    return found


def keep_replacements(
    table: Table, names: list[str], own: Mapping[str, tuple[Tensor, ...]]
) -> None:
    """Tensors that adapters replace and that no base has: one value for all, or an error.

    Where each result has its own (``own``), they may differ.
    """
    for name, given in table.kept.items():
        label, first = given[0]
        reason = f"replaced alike by {len(given)} of {len(table.models)} inputs"
        if is_statistic(name):
            first, reason = average(name, _weighted(table, given), None)
        if name in own:
            reason = "not in the base, that of each model itself"
        free = is_statistic(name) or is_counter(name) or name in own
        for other, tensor in () if free else given[1:]:
            if not same_content(first, tensor):
                why = "no base has it to take differences from"
                fix = "give --base with a model that has this tensor"
                if table.base is not None and name in table.base.tensors:
                    why = "an adapter cannot hold the difference to the base"
                    fix = "write a model (--as model) or a task vector (--as delta)"
                raise MismatchError(
                    f"{name}: {label} and {other} hold different values of it in full, and {why}",
                    fix=f"{fix}, or leave it out of the adapters: task heads are best kept apart",
                )
        table.copies[name] = first
        table.reasons[name] = reason
        if name not in names:
            names.append(name)


def _weighted(table: Table, given: Sequence[tuple[str, Tensor]]) -> list[tuple[str, float, Tensor]]:
    """With each model's weight; weights that differ between tensors count as 1."""
    weights = {m.label: w for m, w in zip(table.models, table.weights, strict=True)}
    plain = {label: w if isinstance(w, (int, float)) else 1.0 for label, w in weights.items()}
    return [(label, plain[label], tensor) for label, tensor in given]
