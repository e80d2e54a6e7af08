"""Matching the tensors of all inputs by name, before any of them is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.ties import same_content
from mergebench.compute.random import stream_of
from mergebench.core.delta import Delta, LowRank, Replacement, reads
from mergebench.core.errors import MismatchError
from mergebench.core.site import (
    BLOCK_PATTERN,
    conv1d_names,
    is_constant,
    is_counter,
    make_sites,
)
from mergebench.core.tensor import FLOATING, Tensor
from mergebench.merge.contributions import in_spaces
from mergebench.merge.held import Table, check_added, keep_replacements, own_values
from mergebench.merge.item import Item
from mergebench.merge.names import check_names, is_optional
from mergebench.merge.spaces import Spaces
from mergebench.sources import Source


@dataclass(frozen=True, eq=False)
class Aligned:
    """The fate of every tensor.

    Attributes
    ----------
    order : tuple of str
        Names of the output's tensors, in the order of the base's files.
    items : mapping of name to Item
        Tensors to be merged.
    copies : mapping of name to Tensor
        Tensors written as they are: untouched, integer, or equal in all inputs.
    twins : mapping of name to names
        Tied tensors on disk that get the same bytes as the merged one.
    reasons : mapping of name to str
        Why a tensor is copied.
    notes : tuple of str
    own : mapping of name to tensors
        Copies that differ between the results of models, one per model.
    """

    order: tuple[str, ...]
    items: Mapping[str, Item]
    copies: Mapping[str, Tensor]
    twins: Mapping[str, tuple[str, ...]]
    reasons: Mapping[str, str]
    notes: tuple[str, ...] = ()
    own: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


def align(
    models: Sequence[Source],
    weights: Sequence[float],
    base: Source | None,
    spaces: Spaces,
    form: str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    pattern: re.Pattern[str] = BLOCK_PATTERN,
    *,
    apart: bool = False,
) -> Aligned:
    """Decide for every tensor whether it is merged or copied, and from what.

    Parameters
    ----------
    models : sequence of Source, in canonical order
    base : Source or None
        A checkpoint.
    spaces : Spaces
        What is combined of each tensor.
    form : model, lora or delta
        What is written.
    shapes : mapping of tensor name to shape, optional
        Of all inputs, also of tensors that filters have taken out: depth counts them.
    pattern : compiled regular expression
        Finds numbered blocks in names.

    Raises
    ------
    MismatchError
        For missing, extra or misshapen tensors and for replaced tensors that differ.
    """
    under = base.checkpoint if base is not None else None
    reference = under or next((m.checkpoint for m in models if m.checkpoint is not None), None)
    table = Table(models, tuple(weights), under)
    full = [each.checkpoint for each in models if each.checkpoint is not None]
    notes = [
        note for each in dict.fromkeys((*([under] if under else []), *full)) for note in each.notes
    ]
    for position, model in enumerate(models):
        added: dict[str, Tensor] = {}
        if model.checkpoint is not None and reference is not None:
            added = check_names(model, reference, notes)
            for name, tensor in added.items():
                table.kept.setdefault(name, []).append((model.label, tensor))
            own = model.checkpoint.tensors.items()
            added |= {n: t for n, t in own if n not in reference.tensors and is_optional(n, t)}
        found = in_spaces(model, base, spaces, form, added)
        for name, delta in found.items():
            if isinstance(delta, Replacement):
                table.kept.setdefault(name, []).append((model.label, delta.values))
                continue
            row = table.deltas.setdefault(name, [None] * len(models))
            row[position] = delta
    names = _order(table, reference, form)
    _check_shapes(table, reference)
    twins: dict[str, tuple[str, ...]] = {}
    if reference is not None:
        _copy_the_rest(table, reference, models, form)
        for alias, source in reference.aliases.items():
            if form == "model":
                twins[source] = (*twins.get(source, ()), alias)
    check_added(table, reference)
    values = own_values(table) if apart else {}
    keep_replacements(table, names, values)
    items = _items(table, reference, spaces, form, shapes or {}, pattern)
    present = [n for n in names if n in items or n in table.copies]
    return Aligned(tuple(present), items, table.copies, twins, table.reasons, tuple(notes), values)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _check_shapes(table: Table, reference: Checkpoint | None) -> None:
    for name, row in table.deltas.items():
        expected, origin = None, ""
        if reference is not None and name in reference.tensors:
            expected, origin = reference.tensors[name].shape, reference.label
        elif reference is not None:
            label = next(m.label for m, d in zip(table.models, row, strict=True) if d is not None)
            raise MismatchError(
                f"{label}: changes {name!r}, which {reference.label} does not have",
                fix="give the base the adapter was trained on",
            )
        for model, delta in zip(table.models, row, strict=True):
            if delta is None:
                continue
            if expected is None:
                expected, origin = delta.shape, model.label
            if delta.shape != expected and not is_constant(name, delta.shape):
                raise MismatchError(
                    f"{name}: {origin} is {_times(expected)}, "
                    f"{model.label} is {_times(delta.shape)}",
                    fix="give models of one architecture, or choose with --on-mismatch base|skip",
                )


def _order(table: Table, reference: Checkpoint | None, form: str) -> list[str]:
    names: dict[str, None] = {}
    if reference is not None:
        wanted: Iterable[str] = reference.tensors
        if form != "model":
            wanted = (name for name in reference.tensors if name in table.deltas)
        names.update(dict.fromkeys(wanted))
    names.update(dict.fromkeys(table.deltas))
    names.update(dict.fromkeys(table.kept))
    return list(names)


def _copy_the_rest(
    table: Table, reference: Checkpoint, models: Sequence[Source], form: str
) -> None:
    for name, tensor in reference.tensors.items():
        if name in reference.aliases or name in table.deltas:
            continue
        if tensor.dtype in FLOATING:
            if form == "model":
                table.copies[name], table.reasons[name] = tensor, "no input changes it"
            continue
        reason = f"{tensor.dtype}, equal in all"
        if is_counter(name):
            reason = f"a counter, taken from {reference.label}"
        for model in () if is_counter(name) else models:
            if model.checkpoint is not None and name in model.checkpoint.tensors:
                _assert_equal(name, reference.label, tensor, model)
        if form == "model":
            table.copies[name], table.reasons[name] = tensor, reason


def _assert_equal(name: str, origin: str, tensor: Tensor, model: Source) -> None:
    assert model.checkpoint is not None
    other = model.checkpoint.tensors[name]
    # Libraries have changed the dtype of masks.
    retyped = tensor.dtype != other.dtype and is_constant(name, tensor.shape)
    if not retyped and not same_content(tensor, other):
        raise MismatchError(
            f"{name}: {tensor.dtype} tensors are not merged and must agree, "
            f"but {model.label} differs from {origin}",
            fix="give models with equal buffers, or take the base's with --on-mismatch base",
        )


def draw_keys(models: Sequence[Source]) -> tuple[int, ...]:
    """64 bits that name each model to counter-based randomness, wherever it stands.

    They are derived from its fingerprint and the number of models before it that have the same
    one, so that a model given twice is drawn for twice.

    Parameters
    ----------
    models : sequence of Source, in canonical order
    """
    seen: Counter[str] = Counter()
    keys = []
    for model in models:
        keys.append(stream_of(int(model.fingerprint, 16), seen[model.fingerprint]))
        seen[model.fingerprint] += 1
    return tuple(keys)


def in_places(aligned: Aligned, places: tuple[int, ...]) -> Aligned:
    """The same, every item knowing the order in which the user has named its models."""
    items = {name: replace(item, places=places) for name, item in aligned.items.items()}
    return replace(aligned, items=items)


def _items(
    table: Table,
    reference: Checkpoint | None,
    spaces: Spaces,
    form: str,
    every: Mapping[str, tuple[int, ...]],
    pattern: re.Pattern[str],
) -> dict[str, Item]:
    shapes = {
        name: next(delta.shape for delta in row if delta is not None)
        for name, row in table.deltas.items()
    }
    # Depth counts the blocks of the whole model, also those that no input touches.
    own = {} if reference is None else {n: t.shape for n, t in reference.tensors.items()}
    known = {**every, **own}
    flipped = _transposed(table, reference)
    sites = make_sites(known | shapes, pattern=pattern, transposed=flipped)
    keys = draw_keys(table.models)
    labels = tuple(model.label for model in table.models)
    items: dict[str, Item] = {}
    wide = False
    for name, row in table.deltas.items():
        under = table.base.tensors.get(name) if table.base is not None else None
        origin = under if spaces.at(name) == "delta" and form == "model" else None
        if _untouched(row, origin, table.base, name):
            assert reference is not None
            # An update has nothing to say of what stays as it is.
            if form == "model":
                table.copies[name] = reference.tensors[name]
                table.reasons[name] = "no input changes it"
            continue
        stored = [tensor for delta in row if delta is not None for tensor in reads(delta)]
        wide |= any(tensor.dtype == "F64" for tensor in (*stored, *([origin] if origin else ())))
        items[name] = Item(
            sites[name], tuple(row), table.weights, labels, origin, origin=under, keys=keys
        )
    # One arithmetic for the whole model, so that magnitudes of different tensors compare.
    dtype = np.dtype(np.float64 if wide else np.float32)
    return {name: replace(item, dtype=dtype) for name, item in items.items()}


def _transposed(table: Table, reference: Checkpoint | None) -> set[str]:
    """Weights stored input × output: those of GPT-2's layers, and what adapters say."""
    config = None if reference is None else reference.config
    found = set(conv1d_names(table.deltas, (config or {}).get("model_type")))
    for name, row in table.deltas.items():
        low = [delta for delta in row if isinstance(delta, LowRank) and not delta.embedding]
        if any(delta.transposed for delta in low):
            found.add(name)
    return found


def _untouched(
    row: Sequence[Delta | None], origin: Tensor | None, base: Checkpoint | None, name: str
) -> bool:
    """Whether every model stands on the base's own tensor, so that nothing can change."""
    own = origin if origin is not None else (base.tensors.get(name) if base else None)
    return own is not None and all(
        delta is None or all(tensor is own for tensor in reads(delta)) for delta in row
    )
