"""Matching the tensors of all inputs by name, before any of them is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.ties import is_tied, same_content
from mergebench.compute.random import stream_of
from mergebench.core.delta import Delta, Dense, Difference, LowRank, Replacement, reads
from mergebench.core.errors import MismatchError
from mergebench.core.site import (
    BLOCK_PATTERN,
    conv1d_names,
    is_constant,
    is_counter,
    is_statistic,
    kind_of,
    make_sites,
)
from mergebench.core.tensor import FLOATING, Tensor
from mergebench.merge.averaged import average
from mergebench.merge.spaces import Spaces
from mergebench.merge.stream import Item
from mergebench.sources import Applied, Source

_UNTIE = (
    "merge models that are both tied or both untied: load the tied one, set tie_word_embeddings to "
    "false, give the head a copy of the embedding and save it"
)


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


@dataclass(eq=False)
class _Table:
    """Work in progress of :func:`align`."""

    models: Sequence[Source]
    weights: tuple[float, ...]
    base: Checkpoint | None
    deltas: dict[str, list[Delta | None]] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    kept: dict[str, list[tuple[str, Tensor]]] = field(default_factory=dict)


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
    table = _Table(models, tuple(weights), under)
    full = [each.checkpoint for each in models if each.checkpoint is not None]
    notes = [
        note for each in dict.fromkeys((*([under] if under else []), *full)) for note in each.notes
    ]
    for position, model in enumerate(models):
        added: dict[str, Tensor] = {}
        if model.checkpoint is not None and reference is not None:
            added = _check_names(model, reference, notes)
            for name, tensor in added.items():
                table.kept.setdefault(name, []).append((model.label, tensor))
            own = model.checkpoint.tensors.items()
            added |= {n: t for n, t in own if n not in reference.tensors and _optional(n, t)}
        found = _in_spaces(model, base, spaces, form, added)
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
    _check_added(table, reference)
    values = _own_values(table) if apart else {}
    _keep_replacements(table, names, values)
    items = _items(table, reference, spaces, form, shapes or {}, pattern)
    present = [n for n in names if n in items or n in table.copies]
    return Aligned(tuple(present), items, table.copies, twins, table.reasons, tuple(notes), values)


def _in_spaces(
    model: Source, base: Source | None, spaces: Spaces, form: str, apart: Mapping[str, Tensor]
) -> dict[str, Delta]:
    """What one model contributes to each floating tensor, in that tensor's space."""
    found = {space: _displacements(model, base, space, form, apart) for space in spaces.used}
    names = dict.fromkeys(name for each in found.values() for name in each)
    return {n: found[spaces.at(n)][n] for n in names if n in found[spaces.at(n)]}


def _displacements(
    model: Source, base: Source | None, space: str, form: str, apart: Mapping[str, Tensor]
) -> dict[str, Delta]:
    """What one model contributes to each floating tensor, in one space."""
    own = model.checkpoint
    if own is not None and model.deltas is not None and space == "delta" and base is not None:
        # An adapter on the very base of the merge is that adapter: no rounding in between.
        own = None if _same_weights(own, base.checkpoint) else own
    over: Mapping[str, Delta] = model.deltas if model.deltas is not None else {}
    if own is None:
        if space == "weight" and base is not None and base.checkpoint is not None:
            own = base.checkpoint
        else:
            # An adapter holds replaced tensors in full, whatever the base has.
            under = base.checkpoint if base is not None and form != "lora" else None
            return {name: _against(delta, under, name) for name, delta in over.items()}
    values: dict[str, Tensor] = {
        name: tensor
        for name, tensor in own.tensors.items()
        if tensor.dtype in FLOATING and name not in own.aliases and name not in apart
    }
    added: dict[str, Delta] = {}
    for name, delta in over.items():
        if isinstance(delta, Replacement) and name not in own.tensors:
            added[name] = delta
        else:
            values[name] = _on_top(values.get(name), delta, name, model.label)
    if space == "weight":
        return added | {name: Dense(tensor) for name, tensor in values.items()}
    assert base is not None
    assert base.checkpoint is not None
    origin = base.checkpoint.tensors
    return added | {name: Difference(tensor, origin[name]) for name, tensor in values.items()}


def _same_weights(own: Checkpoint, base: Checkpoint | None) -> bool:
    return base is not None and own.path.resolve() == base.path.resolve()


def _against(delta: Delta, base: Checkpoint | None, name: str) -> Delta:
    """New values become a difference where the base has the tensor."""
    if isinstance(delta, Replacement) and base is not None and name in base.tensors:
        return Difference(delta.values, base.tensors[name])
    return delta


def _on_top(weight: Tensor | None, delta: Delta, name: str, label: str) -> Tensor:
    if isinstance(delta, Replacement):
        return delta.values
    if weight is None:
        raise MismatchError(f"{label}: the adapter changes {name!r}, which its base does not have")
    return Applied(weight, delta)


def _check_names(model: Source, reference: Checkpoint, notes: list[str]) -> dict[str, Tensor]:
    """Compare names and kinds; returns floating tensors that the reference does not have."""
    assert model.checkpoint is not None
    own = model.checkpoint
    if own is reference:
        return {}
    for name in own.tensors.keys() & reference.tensors.keys():
        kinds = own.tensors[name].dtype, reference.tensors[name].dtype
        differ = (kinds[0] in FLOATING) != (kinds[1] in FLOATING)
        if differ and not is_constant(name, reference.tensors[name].shape):
            raise MismatchError(
                f"{name}: {kinds[0]} in {model.label}, {kinds[1]} in {reference.label}",
                fix="give models that agree on which tensors are numbers to merge",
            )
    mine = set(own.tensors) - set(own.aliases)
    theirs = set(reference.tensors) - set(reference.aliases)
    missing = sorted(theirs - mine - set(own.aliases))
    extra = sorted(mine - theirs - set(reference.aliases))
    # Buffers that one version of a library saves and another does not.
    missing = [name for name in missing if not _optional(name, reference.tensors[name])]
    for name in [name for name in extra if _optional(name, own.tensors[name])]:
        extra.remove(name)
        notes.append(f"{name} of {model.label} is left out: {reference.label} does not have it")
    # Mixtures with a head that repeats the embedding have been made alike before.
    for tied, apart, names in (
        (reference, own, mine & set(reference.aliases)),
        (own, reference, theirs & set(own.aliases)),
    ):
        if names:
            name = min(names)
            raise MismatchError(
                f"{name}: tied to {tied.aliases[name]!r} in {tied.label}, "
                f"but a tensor of its own in {apart.label}",
                fix=_UNTIE,
            )
    if is_tied(own.config) and (lost := [n for n in missing if _is_head(n, reference)]):
        raise MismatchError(
            f"{lost[0]}: tied to the embeddings in {model.label}, but a tensor of its own in "
            f"{reference.label}",
            fix=_UNTIE,
        )
    if missing:
        others = f", and {_few(extra)} not in {reference.label}" if extra else ""
        raise MismatchError(
            f"{model.label}: {len(missing)} tensors are missing ({_few(missing)}){others}",
            fix="give models fine-tuned from the same base, or choose with --on-mismatch "
            "base|skip|union",
        )
    heads = [name for name in extra if kind_of(name, own.tensors[name].shape) == "head"]
    if heads and is_tied(reference.config):
        raise MismatchError(
            f"{heads[0]}: a tensor of its own in {model.label}, but {reference.label} ties it to "
            "the embeddings",
            fix=_UNTIE,
        )
    return {name: own.tensors[name] for name in extra}


def _is_head(name: str, reference: Checkpoint) -> bool:
    return kind_of(name, reference.tensors[name].shape) == "head"


def _optional(name: str, tensor: Tensor) -> bool:
    return tensor.dtype not in FLOATING or is_constant(name, tuple(tensor.shape))


def _check_added(table: _Table, reference: Checkpoint | None) -> None:
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


def _few(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (", …" if len(names) > most else "")


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _check_shapes(table: _Table, reference: Checkpoint | None) -> None:
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


def _order(table: _Table, reference: Checkpoint | None, form: str) -> list[str]:
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
    table: _Table, reference: Checkpoint, models: Sequence[Source], form: str
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


def _own_values(table: _Table) -> dict[str, tuple[Tensor, ...]]:
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


def _keep_replacements(
    table: _Table, names: list[str], own: Mapping[str, tuple[Tensor, ...]]
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


def _weighted(
    table: _Table, given: Sequence[tuple[str, Tensor]]
) -> list[tuple[str, float, Tensor]]:
    """With each model's weight; weights that differ between tensors count as 1."""
    weights = {m.label: w for m, w in zip(table.models, table.weights, strict=True)}
    plain = {label: w if isinstance(w, (int, float)) else 1.0 for label, w in weights.items()}
    return [(label, plain[label], tensor) for label, tensor in given]


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
    table: _Table,
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


def _transposed(table: _Table, reference: Checkpoint | None) -> set[str]:
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
