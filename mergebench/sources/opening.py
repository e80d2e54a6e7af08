"""What is this? From a reference to a checkpoint, a task vector, or an adapter on a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import xxhash

from mergebench.adapters_zoo.adapter import ReadOptions, read_adapter
from mergebench.checkpoints.hub import HubRef, fetch, is_hub, parse_hub
from mergebench.checkpoints.hub_client import is_offline
from mergebench.checkpoints.layout import Checkpoint, open_checkpoint
from mergebench.checkpoints.stacking import Slice, parse_slices, stack
from mergebench.checkpoints.streamed import open_streamed
from mergebench.core.delta import Difference, Replacement
from mergebench.core.errors import FormatError, MergebenchError, ParameterError
from mergebench.core.task_vector import TaskVector
from mergebench.core.tensor import FLOATING
from mergebench.sources import STATISTICS, Applied, Source, fingerprint
from mergebench.sources.adapters import adapter_at
from mergebench.sources.references import exists


def open_source(reference: str, options: ReadOptions) -> Source:
    """Open a path, ``hf://org/name``, ``base+adapter`` or blocks ``a[0-11],b[4-15]``.

    Headers and configs are read, no more. An existing path wins. What a reference to the Hub needs
    is downloaded into the Hub's cache first.

    ``file#task`` is one of several task vectors in a file.

    Raises
    ------
    MergebenchError
        If nothing is there, or if it is neither a checkpoint nor a known kind of adapter.
    """
    if not reference.strip():
        # As a path it would be the current folder, and a variable of a shell that is not set.
        raise ParameterError("a model without a name", fix="give a path; `.` is this folder")
    path = Path(reference).expanduser()
    if exists(path):
        return _open_path(path, reference, options)
    if slices := parse_slices(reference):
        return _open_slices(reference, slices, options)
    held, mark, task = reference.rpartition("#")
    if mark and task and exists(Path(held).expanduser()):
        return _open_path(Path(held).expanduser(), reference, replace(options, task=task))
    left, plus, right = reference.rpartition("+")
    if plus and (is_hub(left) or exists(Path(left).expanduser())):
        return _open_pair(left, right, options)
    if is_hub(reference):
        return _open_hub(parse_hub(reference), reference, options)
    fix = "give a path, hf://org/name, or base+adapter"
    if "=" in reference:
        fix = f"a parameter is written -p {reference}"
    raise MergebenchError(f"{reference}: no such file or folder", fix=fix)


def _open_hub(ref: HubRef, label: str, options: ReadOptions) -> Source:
    commit = options.revisions.get(label)
    streamed = open_streamed(ref, commit) if options.stream and not is_offline() else None
    if streamed is not None:
        fetched, opened = streamed
        source = _of_checkpoint(opened, label, fetched.path)
    else:
        fetched = fetch(ref, commit)
        source = _open_path(fetched.path, label, options)
    checkpoint = source.checkpoint
    return replace(
        source,
        checkpoint=None if checkpoint is None else replace(checkpoint, label=label),
        # The commit says more than the time of a download.
        identity=tuple(
            {**each, "mtime_ns": 0, "commit": fetched.commit} for each in source.identity
        ),
        revisions={label: fetched.commit},
    )


def _open_pair(left: str, right: str, options: ReadOptions) -> Source:
    under = open_source(left, options)
    if under.checkpoint is None:
        raise MergebenchError(f"{left}: is not a checkpoint", fix="write base+adapter")
    top = open_source(right, with_base(options, under.checkpoint))
    if top.deltas is None:
        raise MergebenchError(f"{right}: is not an adapter", fix="write base+adapter")
    return Source(
        f"{left}+{right}",
        under.checkpoint,
        top.deltas,
        _joined(under.fingerprint, top.fingerprint),
        top.config,
        (*under.identity, *top.identity),
        top.adapter,
        packed=top.packed,
        revisions={**under.revisions, **top.revisions},
    )


def _open_slices(label: str, slices: tuple[Slice, ...], options: ReadOptions) -> Source:
    # Names and shapes of the base are those of the whole stack, not of its parts.
    plain = replace(options, base_shapes=None, base=None)
    opened = {path: open_source(path, plain) for path in dict.fromkeys(s.path for s in slices)}
    parts = [opened[each.path] for each in slices]
    checkpoints = []
    for each, part in zip(slices, parts, strict=True):
        if part.checkpoint is None:
            raise MergebenchError(
                f"{each.path}: is an adapter, and blocks are taken from models",
                fix=f"write base+adapter: base+{each}",
            )
        checkpoints.append(part.checkpoint)
    stacked = stack(label, slices, checkpoints)
    deltas = {
        new: part.deltas[own]
        for part, names in zip(parts, stacked.origins, strict=True)
        for new, own in names.items()
        if part.deltas is not None and own in part.deltas
    }
    whole = stacked.checkpoint
    marks = [part.fingerprint for part in parts if part.deltas is not None]
    once = {n: t for n, t in whole.tensors.items() if n not in whole.aliases}
    mark = _joined(fingerprint(once), *marks) if marks else fingerprint(once)
    return Source(
        label,
        whole,
        TaskVector(label, deltas, mark) if deltas else None,
        mark,
        parts[0].config,
        # Files of several models have the same names.
        tuple(
            {**each, "name": f"{place}/{each['name']}"}
            for place, part in enumerate(opened.values())
            for each in part.identity
        ),
        revisions={ref: at for part in opened.values() for ref, at in part.revisions.items()},
    )


def _joined(*parts: str) -> str:
    return xxhash.xxh3_128("+".join(parts).encode()).hexdigest()


def with_base(options: ReadOptions, base: Checkpoint) -> ReadOptions:
    """Reading options that know the base's tensor names and shapes."""
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    return replace(options, base_shapes=shapes, base=base.tensors)


def _open_path(path: Path, label: str, options: ReadOptions) -> Source:
    if (adapter := adapter_at(path, label)) is not None:
        source, identity, packed = adapter
        deltas = read_adapter(source, options)
        mark = fingerprint(source.tensors)
        if options.task is not None:
            mark = _joined(mark, options.task)
        config = source.config or {}
        return Source(label, None, deltas, mark, config, identity, source, path=path, packed=packed)
    if options.task is not None:
        raise FormatError(
            f"{path}: is a model, and task {options.task!r} is named",
            fix=f"leave out #{options.task}",
        )
    return _of_checkpoint(open_checkpoint(path), label, path)


def _of_checkpoint(checkpoint: Checkpoint, label: str, path: Path) -> Source:
    if STATISTICS in checkpoint.metadata:
        raise FormatError(
            f"{label}: holds statistics of a model, and is none",
            fix="give it as --statistics, beside its model",
        )
    once = {n: t for n, t in checkpoint.tensors.items() if n not in checkpoint.aliases}
    mark = fingerprint(once)
    return Source(label, checkpoint, None, mark, {}, tuple(checkpoint.identity), path=path)


def load(
    reference: str | Path, base: str | Path | None = None, lora_alpha: float | None = None
) -> Checkpoint | TaskVector:
    """Open a model or an adapter; nothing but headers and configs is read.

    Parameters
    ----------
    reference : path
        A checkpoint, an adapter, a saved task vector, or ``base+adapter``.
    base : path, optional
        With it, a checkpoint is opened as its task vector: fine-tuned minus base.
    lora_alpha : float, optional
        For bare adapter files that do not name theirs.

    Returns
    -------
    Checkpoint or TaskVector
        ``base+adapter`` without ``base`` gives a checkpoint whose tensors carry the adapter.

    Raises
    ------
    MergebenchError
        If nothing is there, or it is not understood.
    """
    options = ReadOptions(lora_alpha=lora_alpha)
    under = None if base is None else open_source(str(base), options).checkpoint
    if base is not None and under is None:
        raise MergebenchError(f"{base}: the base must be a checkpoint", got="an adapter")
    source = open_source(str(reference), options if under is None else with_base(options, under))
    if source.checkpoint is None:
        assert source.deltas is not None
        return source.deltas
    applied = dict(source.checkpoint.tensors)
    for name, delta in (source.deltas or {}).items():
        if isinstance(delta, Replacement):
            applied[name] = delta.values
        else:
            applied[name] = Applied(applied[name], delta)
    whole = replace(source.checkpoint, label=source.label, tensors=applied)
    if under is None:
        return whole
    pairs = {}
    for name, tensor in whole.tensors.items():
        if tensor.dtype not in FLOATING:
            continue
        if name not in under.tensors or under.tensors[name].shape != tensor.shape:
            raise MergebenchError(
                f"{reference}: {name} is not in {base}, or of another shape",
                fix="give the base it was fine-tuned from",
            )
        pairs[name] = Difference(tensor, under.tensors[name])
    return TaskVector(source.label, pairs, source.fingerprint)
