"""Models that tie the head to the embedding beside models that store it twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.ties import heads, is_tied, same_bytes
from mergebench.sources import Source


def tie_alike(
    models: Sequence[Source], base: Source | None
) -> tuple[tuple[Source, ...], Source | None, list[str]]:
    """Treat heads that repeat the embedding as tied, where another input is tied.

    Entries are read only where tied and untied inputs meet. Without a base the tied ones get their
    head as a tensor of its own, so that the output is right under the config of either.

    Returns
    -------
    models, base, notes
    """
    full = [each for each in (base, *models) if each is not None and each.checkpoint is not None]
    stored = {id(each): _own_heads(each.checkpoint) for each in full if each.checkpoint is not None}
    apart = [each for each in full if stored[id(each)]]
    tied = [each for each in full if each not in apart and _is_tied(each.checkpoint)]
    if not apart or not tied:
        return tuple(models), base, []
    changed: dict[int, Source] = {}
    notes = []
    for source in apart:
        own = source.checkpoint
        assert own is not None
        same = {
            head: name
            for head, names in stored[id(source)].items()
            for name in names
            if same_bytes(own.tensors[head], own.tensors[name])
        }
        if same:
            changed[id(source)] = replace(
                source, checkpoint=replace(own, aliases={**own.aliases, **same})
            )
            notes.append(
                f"{min(same)} of {source.label} repeats {same[min(same)]!r} and is taken as tied, "
                f"as in {tied[0].label}"
            )
    if base is None and changed:
        both = next(iter(changed.values())).checkpoint
        assert both is not None
        for source in tied:
            own = source.checkpoint
            assert own is not None
            lacking = {h: n for h, n in both.aliases.items() if h not in own.tensors}
            tensors = {**own.tensors, **{h: own.tensors[n] for h, n in lacking.items()}}
            twice = replace(own, tensors=tensors, aliases={**own.aliases, **lacking})
            changed[id(source)] = replace(source, checkpoint=twice)
    alike = tuple(changed.get(id(each), each) for each in models)
    return alike, None if base is None else changed.get(id(base), base), notes


def _own_heads(checkpoint: Checkpoint | None) -> dict[str, list[str]]:
    """Stored heads that are no alias, with the embeddings they might repeat."""
    if checkpoint is None:
        return {}
    found = heads(checkpoint.tensors)
    return {h: names for h, names in found.items() if names and h not in checkpoint.aliases}


def _is_tied(checkpoint: Checkpoint | None) -> bool:
    return checkpoint is not None and is_tied(checkpoint.config)
