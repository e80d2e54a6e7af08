"""Rows of embeddings and heads, matched by token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.rows import MeanRows, Rows
from mergebench.checkpoints.tokenizers import Vocabulary, read_vocabulary
from mergebench.core.errors import MismatchError
from mergebench.core.site import kind_of
from mergebench.core.tensor import FLOATING, Array, Tensor

_NOT_TOKENS = re.compile(r"(?i)(^|[._])(pos(ition(al|s)?)?|wpe|token_type|type|segment|patch)")


@dataclass(frozen=True, eq=False)
class Lexicon:
    """The tokens and the matrices of one model that have a row for each.

    Attributes
    ----------
    label : str
    checkpoint : Checkpoint
    rows : int
        Of its matrices; 0 where it has none.
    names : tuple of str
        Tensors with one row per token.
    tokens : Vocabulary or None
    """

    label: str
    checkpoint: Checkpoint
    rows: int
    names: tuple[str, ...]
    tokens: Vocabulary | None

    def row_of(self, named: Mapping[int, str], rows: int, *, by_token: bool) -> Array:
        """Own row of each of ``rows`` rows, or -1.

        Parameters
        ----------
        named : mapping of row to token
            Tokens of the rows asked for.
        by_token : bool
            Match tokens, and by index only rows that no tokenizer names.
        """
        place = np.arange(rows, dtype=np.int64)
        index = np.where(place < self.rows, place, -1)
        if not by_token or self.tokens is None:
            return index
        for row in self.named():
            # A row that means a token here has no unnamed counterpart.
            if row < rows:
                index[row] = -1
        for row, token in named.items():
            if row < rows:
                own = self.tokens.ids.get(token, -1)
                index[row] = own if own < self.rows else -1
        return index

    def named(self) -> dict[int, str]:
        """Token of each row that has one; tokens beyond the last row are of no model."""
        found = {} if self.tokens is None else self.tokens.by_row()
        return {row: token for row, token in found.items() if row < self.rows}


def lexicon(label: str, checkpoint: Checkpoint) -> Lexicon:
    """The vocabulary of a model.

    Raises
    ------
    FormatError
        If the files of its tokenizer are unsound.
    """
    kinds = {
        name: kind_of(name, tensor.shape)
        for name, tensor in checkpoint.tensors.items()
        if tensor.dtype in FLOATING and tensor.shape and not _NOT_TOKENS.search(name)
    }
    sizes = [
        checkpoint.tensors[name].shape[0]
        for name, kind in kinds.items()
        if kind == "embedding" and len(checkpoint.tensors[name].shape) == 2
    ]
    stated = [size for size in _sizes(checkpoint.config or {}) if size in sizes]
    rows = stated[0] if stated else max(sizes, default=0)
    names = tuple(
        name
        for name, kind in kinds.items()
        if kind in ("embedding", "head") and checkpoint.tensors[name].shape[0] == rows
    )
    tokens = read_vocabulary(checkpoint.folder) if rows else None
    return Lexicon(label, checkpoint, rows, names if rows else (), tokens)


def _sizes(config: Mapping[str, Any]) -> list[int]:
    found = [config["vocab_size"]] if isinstance(config.get("vocab_size"), int) else []
    for part in config.values():
        if isinstance(part, Mapping):
            found += _sizes(part)
    return found


def compare(reference: Lexicon, other: Lexicon, policy: str) -> str:
    """How a model's vocabulary differs, in words; empty where that does not matter.

    Row counts, tokens that stand at other rows, and with ``pad`` tokens that are new.
    """
    parts = []
    if other.rows and reference.rows != other.rows:
        parts.append(
            f"{other.rows:,} rows in {other.label}, {reference.rows:,} in {reference.label}"
        )
    if reference.tokens is not None and other.tokens is not None:
        mine, theirs = reference.named(), other.named()
        moved = [row for row in mine.keys() & theirs.keys() if mine[row] != theirs[row]]
        if moved:
            row = min(moved)
            parts.append(
                f"{len(moved):,} rows mean other tokens, such as row {row}: {theirs[row]!r} there "
                f"and {mine[row]!r} here"
            )
        new = [token for token in theirs.values() if token not in reference.tokens.ids]
        if new and (parts or policy == "pad"):
            shown = ", ".join(map(repr, new[:3])) + (", …" if len(new) > 3 else "")
            parts.append(f"{len(new):,} tokens are new ({shown})")
    return "; ".join(parts)


def contradiction(reference: Lexicon, others: Sequence[Lexicon]) -> str:
    """A row that the reference does not name and two models name differently; else empty."""
    mine = reference.named()
    seen: dict[int, tuple[str, str]] = {}
    for other in others:
        for row, token in other.named().items():
            if row in mine:
                continue
            label, known = seen.setdefault(row, (other.label, token))
            if known != token:
                return f"row {row} means {known!r} in {label} and {token!r} in {other.label}"
    return ""


@dataclass(frozen=True, eq=False)
class Joined:
    """One vocabulary for all.

    Attributes
    ----------
    rows : int
    named : mapping of row to token
        Empty where rows are matched by index.
    by_token : bool
    holders : mapping of token to Lexicon
        Of tokens that the reference lacks.
    """

    rows: int
    named: Mapping[int, str]
    by_token: bool
    holders: Mapping[str, Lexicon] = field(default_factory=dict)


def join(reference: Lexicon, others: Sequence[Lexicon], policy: str) -> Joined:
    """The vocabulary of the output: the reference's, and with ``pad`` what the others add."""
    if reference.tokens is None or any(each.tokens is None for each in others):
        most = max([reference.rows, *(each.rows for each in others)])
        return Joined(most if policy == "pad" else reference.rows, {}, by_token=False)
    named = reference.named()
    known = set(named.values())
    holders: dict[str, Lexicon] = {}
    rows = reference.rows
    # One after the other, as tokenizers number the tokens that are added to them.
    place = max(named, default=-1) + 1
    for other in others if policy == "pad" else ():
        for _, token in sorted(other.named().items()):
            if token not in known:
                named[place], holders[token] = token, other
                known.add(token)
                place += 1
        # Rows that no tokenizer names, such as those that round a size up.
        rows = max(rows, other.rows, place)
    return Joined(rows, named, by_token=True, holders=holders)


def rearranged(
    reference: Lexicon, others: Sequence[Lexicon], joined: Joined, policy: str
) -> tuple[Checkpoint, list[Checkpoint]]:
    """The reference and the others with every matrix in the rows of the joined vocabulary.

    Raises
    ------
    MismatchError
        If a matrix of one has no counterpart of the same width in another.
    """
    rows, named, by_token = joined.rows, joined.named, joined.by_token
    base_index = reference.row_of(named, rows, by_token=by_token)
    place = {token: row for row, token in named.items()}
    base_index[[place[token] for token in joined.holders]] = -1
    indexes = [each.row_of(named, rows, by_token=by_token) for each in others]
    if policy == "intersect":
        lacking = np.zeros(rows, np.bool_)
        for index in indexes:
            lacking |= index < 0
        indexes = [np.where(lacking, -1, index) for index in indexes]
    base = dict(reference.checkpoint.tensors)
    changed: list[dict[str, Tensor]] = [dict(each.checkpoint.tensors) for each in others]
    for name in reference.names:
        own = reference.checkpoint.tensors[name]
        # Filters put the reference's tensor in the place of a model's.
        have = [
            (each.checkpoint.tensors[name], index)
            for each, index in zip(others, indexes, strict=True)
            if name in each.names and each.checkpoint.tensors.get(name) is not own
        ]
        if rows > reference.rows and not have:
            raise MismatchError(
                f"{name}: gets rows for new tokens, and no model is left to take them from",
                fix="let filters select all embeddings and heads, or use --vocab intersect",
            )
        for each in others:
            tensor = each.checkpoint.tensors.get(name)
            if tensor is not None and name in each.names and tensor.shape[1:] != own.shape[1:]:
                raise MismatchError(
                    f"{name}: rows of {own.shape[1:]} in {reference.label} and of "
                    f"{tensor.shape[1:]} in {each.label}",
                    fix="give models of one width",
                )
        if not have:
            continue
        mean = MeanRows([t for t, _ in have], [index for _, index in have], own.dtype)
        base[name] = view = (
            own if _is_plain(base_index, own) else Rows(own, base_index, mean, own.dtype)
        )
        for each, tensors, index in zip(others, changed, indexes, strict=True):
            mine = each.checkpoint.tensors.get(name)
            if mine is own:
                tensors[name] = view
            elif mine is not None and name in each.names:
                tensors[name] = mine if _is_plain(index, mine) else Rows(mine, index, view)
    return (
        replace(reference.checkpoint, tensors=base),
        [replace(e.checkpoint, tensors=t) for e, t in zip(others, changed, strict=True)],
    )


def _is_plain(index: Array, tensor: Tensor) -> bool:
    return len(index) == tensor.shape[0] and bool((index == np.arange(len(index))).all())
