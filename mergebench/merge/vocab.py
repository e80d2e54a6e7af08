"""``--vocab``: one vocabulary for models that have different ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mergebench.checkpoints.documents import read_object
from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.tokenizers import FAST
from mergebench.core.errors import MismatchError
from mergebench.merge.vocabulary import (
    Joined,
    Lexicon,
    compare,
    contradiction,
    join,
    lexicon,
    rearranged,
)
from mergebench.sources import Source

_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "spiece*", "sentencepiece*", "normalizer.json", "chat_template*"),
)


@dataclass(frozen=True, eq=False)
class Reconciled:
    """Inputs with one vocabulary.

    Attributes
    ----------
    models : tuple of Source
    base, first : Source or None
        ``first`` is the full model whose config and tokenizer the output gets without a base.
    sides : mapping of file name to content, file or None
        Files of the output that are not the reference's; ``None`` for one that is left out.
    notes : tuple of str
    """

    models: tuple[Source, ...]
    base: Source | None
    first: Source | None
    sides: Mapping[str, bytes | Path | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def reconcile(
    given: Sequence[Source],
    models: Sequence[Source],
    base: Source | None,
    first: Source | None,
    form: str,
    policy: str,
) -> Reconciled:
    """Give all full models the rows of one vocabulary.

    Rows are matched by token where all have a tokenizer that can be read, else by index.

    Parameters
    ----------
    given, models : sequence of Source, in canonical order
        As they came, and as filters leave them.
    base, first : Source or None
        The reference: the base, else the first full model of the command line.
    form : model, lora or delta
        Only a model can get rows that the reference lacks.
    policy : error, pad, intersect or base
        ``intersect`` keeps the reference's vocabulary: rows that all have are merged, the others
        are the reference's. ``base`` keeps it too, and merges a row that a model lacks as if that
        model had the reference's. ``pad`` adds the tokens of the others; a row that the reference
        lacks stands there as the mean of the models that have it, so that a model without it does
        not move it and a single model with it gives its own.

    Raises
    ------
    MismatchError
        With ``error``, if vocabularies differ; with the others, if no tokenizer can be written
        for the result, or an adapter changes a matrix that would be rearranged.
    """
    plain = Reconciled(tuple(models), base, first)
    reference = base if base is not None else first
    if reference is None or reference.checkpoint is None:
        return plain
    mine = lexicon(reference.label, reference.checkpoint)
    several = [
        (before, each)
        for before, each in zip(given, models, strict=True)
        if each.checkpoint is not None and each is not reference and before is not reference
    ]
    # Where filters have left the matrices to the base, the vocabulary of a model does not matter.
    pairs = [pair for pair in several if not _has_rows_of(pair[1], mine)]
    full = [each for _, each in pairs]
    if not full or not mine.rows:
        return plain
    others = [_lexicon(before, each) for before, each in pairs]
    differences = [compare(mine, other, policy) for other in others]
    against = contradiction(mine, others)
    if not any(differences) and not against:
        return plain
    if policy == "error" and not any(differences):
        raise MismatchError(
            f"{against}, where {mine.label} has no token",
            fix="--vocab pad keeps both, --vocab intersect neither",
        )
    if policy == "error":
        place = next(index for index, text in enumerate(differences) if text)
        raise MismatchError(
            f"{others[place].label}: its vocabulary is not that of {mine.label}: "
            f"{differences[place]}",
            fix="--vocab intersect merges the rows that all have, --vocab pad keeps all tokens",
        )
    for each in (reference, *models):
        touched = sorted(set(each.deltas or {}).intersection(mine.names))
        if touched:
            raise MismatchError(
                f"{each.label}: an adapter changes {touched[0]}, whose rows are rearranged",
                fix="write the model with its adapter first, then merge that",
            )
    joined = join(mine, others, policy)
    if form != "model" and joined.rows != mine.rows:
        raise MismatchError(
            f"--vocab pad adds rows, which no task vector on {mine.label} can have",
            fix="write a model (--as model), or use --vocab intersect",
        )
    under, changed = rearranged(mine, others, joined, policy)
    sides = _sides(mine, others, joined) if joined.named else {}
    if joined.rows != mine.rows and under.config is not None:
        config = _resized(under.config, mine.rows, joined.rows)
        under = replace(under, config=config)
        sides = {**sides, "config.json": (json.dumps(config, indent=2) + "\n").encode()}
    new = {id(each): replace(each, checkpoint=c) for each, c in zip(full, changed, strict=True)}
    new[id(reference)] = replace(reference, checkpoint=under)
    views = {name: under.tensors[name] for name in mine.names}
    for _, each in several:
        if id(each) not in new:
            own = _own(each)
            new[id(each)] = replace(each, checkpoint=replace(own, tensors={**own.tensors, **views}))
    return Reconciled(
        tuple(new.get(id(each), each) for each in models),
        None if base is None else new[id(base)],
        None if first is None else new.get(id(first), first),
        sides,
        tuple(_notes(mine, joined, policy, [text for text in differences if text])),
    )


def _lexicon(before: Source, now: Source) -> Lexicon:
    """The vocabulary that a model came with, and the tensors that filters have left it."""
    return replace(lexicon(before.label, _own(before)), checkpoint=_own(now))


def _has_rows_of(source: Source, mine: Lexicon) -> bool:
    tensors = _own(source).tensors
    return all(tensors.get(name) is mine.checkpoint.tensors[name] for name in mine.names)


def _own(source: Source) -> Checkpoint:
    assert source.checkpoint is not None
    return source.checkpoint


def _notes(mine: Lexicon, joined: Joined, policy: str, differences: Sequence[str]) -> list[str]:
    how = "by token" if joined.by_token else "by index, as not every input has a tokenizer we read"
    notes = [f"vocabularies differ ({text}); rows are matched {how}" for text in differences]
    if policy == "pad":
        notes.append(
            f"the output has {joined.rows:,} rows, {len(joined.holders):,} tokens more than "
            f"{mine.label}"
        )
    else:
        notes.append(f"the output keeps the vocabulary of {mine.label}")
    return notes


def _resized(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """The config with every size of the vocabulary replaced."""
    return {
        key: _resized(value, before, after)
        if isinstance(value, Mapping)
        else after
        if key == "vocab_size" and value == before
        else value
        for key, value in config.items()
    }


def _sides(
    mine: Lexicon, others: Sequence[Lexicon], joined: Joined
) -> dict[str, bytes | Path | None]:
    """Files of a tokenizer that has exactly the tokens of the output."""
    if not joined.holders:
        return {}
    wanted = {token: row for row, token in joined.named.items()}
    for other in others:
        assert other.tokens is not None
        if dict(other.tokens.ids) == wanted:
            taken: dict[str, bytes | Path | None] = {
                name: None for name in mine.checkpoint.sides() if _is_tokenizer(name)
            }
            found = other.checkpoint.sides().items()
            return taken | {name: path for name, path in found if _is_tokenizer(name)}
    assert mine.tokens is not None
    if mine.tokens.file != FAST or mine.checkpoint.folder is None:
        raise MismatchError(
            f"{mine.label}: has no {FAST}, so a tokenizer with {len(joined.holders)} more tokens "
            "cannot be written",
            fix="save its tokenizer as a fast one, or use --vocab intersect",
        )
    before = len(wanted) - len(joined.holders)
    if sorted(mine.tokens.ids.values()) != list(range(before)):
        raise MismatchError(
            f"{mine.label}: the ids of its tokenizer are not 0 to {before - 1:,}, each once and "
            "with a row, so tokens that are added to it would be loaded at other rows",
            fix="use --vocab intersect, or save a tokenizer without gaps",
        )
    return _extended(mine.checkpoint.folder, joined, wanted)


def _is_tokenizer(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _FILES)


def _extended(
    folder: Path, joined: Joined, wanted: Mapping[str, int]
) -> dict[str, bytes | Path | None]:
    """The reference's tokenizer with the new tokens as added tokens."""
    data = read_object(folder / FAST)
    added = []
    for token, holder in joined.holders.items():
        assert holder.tokens is not None
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                 "special": False}  # fmt: skip
        about = {**flags, **holder.tokens.added.get(token, {})}
        added.append({**about, "content": token, "id": wanted[token]})
    rows = sorted([*(data.get("added_tokens") or []), *added], key=lambda each: int(each["id"]))
    sides: dict[str, bytes | Path | None] = {FAST: _text({**data, "added_tokens": rows})}
    config = folder / "tokenizer_config.json"
    if config.is_file() and isinstance(
        (known := read_object(config)).get("added_tokens_decoder"), dict
    ):
        decoder = {str(each["id"]): _without_id(each) for each in added}
        merged = {**known, "added_tokens_decoder": {**known["added_tokens_decoder"], **decoder}}
        sides[config.name] = _text(merged)
    table = folder / "added_tokens.json"
    if table.is_file():
        sides[table.name] = _text({**read_object(table), **{t: wanted[t] for t in joined.holders}})
    return sides


def _without_id(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "id"}


def _text(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="surrogatepass")
