"""Blocks of several checkpoints put on top of each other, as one checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergebench.checkpoints.layout import Checkpoint
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.site import BLOCK_PATTERN, stands_before
from mergebench.core.tensor import Tensor

_SLICE = re.compile(r"(?P<path>.+)\[(?P<first>\d+)-(?P<last>\d+)\]", re.DOTALL)
_BETWEEN = re.compile(r"(?<=\]),")
#: How configs call the number of blocks.
_COUNT = re.compile(r"num_(hidden_)?layers|n_layers?|max_window_layers")
#: Lists with one value for each block, or with the numbers of some blocks.
_PER_LAYER = re.compile(r"layer|block")


@dataclass(frozen=True)
class Slice:
    """Blocks ``first`` to ``last``, both included, of the model at a path."""

    path: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.path}[{self.first}-{self.last}]"


@dataclass(frozen=True, eq=False)
class Stacked:
    """One checkpoint made of blocks of several.

    Attributes
    ----------
    checkpoint : Checkpoint
    origins : tuple of mapping of tensor name to own name
        For each slice, the tensors of the result that come from it, and what it calls them.
    """

    checkpoint: Checkpoint
    origins: tuple[Mapping[str, str], ...]


def parse_slices(reference: str) -> tuple[Slice, ...]:
    """The slices of a reference such as ``a[0-11],b[4-15]``; none if it is no such reference."""
    found = []
    for part in _BETWEEN.split(reference):
        match = _SLICE.fullmatch(part)
        if match is None:
            return ()
        found.append(Slice(match["path"], int(match["first"]), int(match["last"])))
    return tuple(found)


def stack(label: str, slices: Sequence[Slice], parts: Sequence[Checkpoint]) -> Stacked:
    """Put blocks on top of each other; no tensor is read or copied.

    Tensors that stand before the blocks (embeddings) are those of the first slice's model, what
    stands behind them (final norm, head) of the last's. The config is the first's, with the number
    of blocks and everything it lists by block changed.

    Parameters
    ----------
    label : str
    slices, parts : sequences of the same length

    Raises
    ------
    MismatchError
        If a model has several stacks of blocks, lacks some of the blocks, or does not fit to the
        others.
    """
    stacks = [_stack_of(part) for part in parts]
    tensors: dict[str, Tensor] = {}
    origins: list[dict[str, str]] = [{} for _ in parts]
    first, last = 0, len(parts) - 1
    name_of = stacks[0][0]
    at = 0
    for place, (cut, part, (own, count)) in enumerate(zip(slices, parts, stacks, strict=True)):
        _check_range(cut, part, count)
        for name in part.tensors:
            match = BLOCK_PATTERN.match(name)
            if match is None:
                if place == (first if stands_before(name) else last):
                    origins[place][name] = name
            elif cut.first <= (index := int(match["index"])) <= cut.last:
                rest = name[len(own) + len(match["index"]) + 1 :]
                origins[place][f"{name_of}.{at + index - cut.first}{rest}"] = name
        at += cut.last - cut.first + 1
    _check_fit(parts, stacks, origins)
    for part, names in zip(parts, origins, strict=True):
        tensors |= {new: part.tensors[own] for new, own in names.items()}
    aliases, tensors = _ties(parts, origins, tensors)
    sources = [i for cut in slices for i in range(cut.first, cut.last + 1)]
    owners = [p for p, cut in enumerate(slices) for _ in range(cut.first, cut.last + 1)]
    config = _config(parts, [count for _, count in stacks], owners, sources)
    whole = replace(
        parts[0],
        label=label,
        path=Path(label),
        tensors=_ordered(tensors),
        shard_of={},
        config=config,
        config_changed=config != parts[0].config,
        aliases=aliases,
        identity=tuple(each for part in dict.fromkeys(parts) for each in part.identity),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
    return Stacked(whole, tuple(origins))


def _stack_of(part: Checkpoint) -> tuple[str, int]:
    """The name of the only stack of blocks, and how many it has."""
    found: dict[str, set[int]] = {}
    for name in part.tensors:
        if match := BLOCK_PATTERN.match(name):
            found.setdefault(match["stack"], set()).add(int(match["index"]))
    if len(found) != 1:
        names = ", ".join(sorted(found)) or "none"
        raise MismatchError(
            f"{part.label}: blocks are taken from models with one stack of them", got=names
        )
    name, indexes = next(iter(found.items()))
    return name, max(indexes) + 1


def _check_range(cut: Slice, part: Checkpoint, count: int) -> None:
    if cut.first > cut.last:
        raise FormatError(f"{cut}: the last block comes before the first")
    if cut.last >= count:
        raise MismatchError(
            f"{cut}: {part.label} has no block {cut.last}", expected=f"0 to {count - 1}"
        )


def _check_fit(
    parts: Sequence[Checkpoint],
    stacks: Sequence[tuple[str, int]],
    origins: Sequence[Mapping[str, str]],
) -> None:
    """Blocks of another model must have tensors and shapes that the first model's blocks have."""

    def inner(place: int, name: str) -> str:
        match = BLOCK_PATTERN.match(name)
        return name if match is None else name[match.end() :]

    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, tensor in parts[0].tensors.items():
        shapes.setdefault(inner(0, name), set()).add(tuple(tensor.shape))
    for place, (part, names) in enumerate(zip(parts, origins, strict=True)):
        if part is parts[0]:
            continue
        for own in names.values():
            shape, known = tuple(part.tensors[own].shape), shapes.get(inner(place, own))
            # A head of its own beside a tied one is met where configs are compared.
            if known is not None and shape not in known:
                raise MismatchError(
                    f"{own}: {shape} in {part.label}, {min(known)} in {parts[0].label}",
                    fix="stack blocks of models of one architecture and width",
                )
            if known is None and BLOCK_PATTERN.match(own):
                raise MismatchError(
                    f"{own} of {part.label}: the blocks of {parts[0].label} have no such tensor",
                    fix="stack blocks of models of one architecture",
                )
    ties = {bool(part.config.get("tie_word_embeddings")) for part in parts if part.config}
    if len(ties) > 1:
        raise MismatchError(
            f"{parts[0].label} and {parts[-1].label}: one ties its head to the embeddings, the "
            "other does not",
            fix="stack models that are both tied or both untied",
        )


def _ties(
    parts: Sequence[Checkpoint],
    origins: Sequence[Mapping[str, str]],
    tensors: dict[str, Tensor],
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Names of one tensor: kept where both sides come from one model, else the copy is dropped."""
    aliases: dict[str, str] = {}
    dropped: set[str] = set()
    for part, names in zip(parts, origins, strict=True):
        for new, own in names.items():
            source = part.aliases.get(own)
            if source is None:
                continue
            twin = next((n for n, o in names.items() if o == source), None)
            if twin is not None:
                aliases[new] = twin
            elif source in tensors and stands_before(source):
                dropped.add(new)
    # What is not block or embedding and shared in its own model alone stays a tensor of its own.
    return aliases, {name: tensor for name, tensor in tensors.items() if name not in dropped}


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Before the blocks, the blocks by number, behind them."""

    def place(name: str) -> tuple[int, int]:
        if match := BLOCK_PATTERN.match(name):
            return 1, int(match["index"])
        return (0 if stands_before(name) else 2), 0

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _config(
    parts: Sequence[Checkpoint],
    counts: Sequence[int],
    owners: Sequence[int],
    sources: Sequence[int],
) -> dict[str, Any] | None:
    configs = [part.config for part in parts]
    if configs[0] is None:
        return None
    return _restacked([each or {} for each in configs], counts, owners, sources)


def _restacked(
    configs: Sequence[Mapping[str, Any]],
    counts: Sequence[int],
    owners: Sequence[int],
    sources: Sequence[int],
) -> dict[str, Any]:
    """The first config with every number and list of blocks changed."""
    changed: dict[str, Any] = {}
    for key, value in configs[0].items():
        own = [config.get(key) for config in configs]
        if isinstance(value, Mapping):
            inner = [each if isinstance(each, Mapping) else {} for each in own]
            changed[key] = _restacked(inner, counts, owners, sources)
        elif _COUNT.fullmatch(key) and value == counts[0]:
            changed[key] = len(sources)
        elif key == "first_k_dense_replace" and isinstance(value, int):
            changed[key] = _leading(own, owners, sources)
        elif isinstance(value, list) and value and _PER_LAYER.search(key):
            changed[key] = _listed(key, own, counts, owners, sources)
        else:
            changed[key] = value
    return changed


def _leading(own: Sequence[Any], owners: Sequence[int], sources: Sequence[int]) -> int:
    """How many blocks at the bottom are dense, where a config counts them."""
    dense = [source < (own[owner] or 0) for owner, source in zip(owners, sources, strict=True)]
    leading = dense.index(False) if False in dense else len(dense)
    if any(dense[leading:]):
        raise MismatchError(
            "dense blocks above blocks of experts, which a config cannot say "
            "(first_k_dense_replace)",
            fix="take blocks with dense layers for the bottom only",
        )
    return leading


def _listed(
    key: str,
    own: Sequence[Any],
    counts: Sequence[int],
    owners: Sequence[int],
    sources: Sequence[int],
) -> list[Any]:
    """A list by block, or of the numbers of some blocks, for the blocks of the result."""
    if all(isinstance(v, list) and len(v) == n for v, n in zip(own, counts, strict=True)):
        return [own[owner][source] for owner, source in zip(owners, sources, strict=True)]
    numbers = [value if isinstance(value, list) else [] for value in own]
    if all(isinstance(n, int) and not isinstance(n, bool) for each in numbers for n in each):
        pairs = enumerate(zip(owners, sources, strict=True))
        return [at for at, (owner, source) in pairs if source in numbers[owner]]
    raise MismatchError(
        f"config.json: {key!r} says something about each layer that cannot be stacked",
        got=repr(own[0])[:100],
    )
