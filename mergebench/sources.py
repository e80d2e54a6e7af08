"""What is this? From a reference to a checkpoint, a task vector, or an adapter on a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mergebench.adapters_zoo.adapter import (
    FILE_KEY,
    AdapterSource,
    ReadOptions,
    is_adapter,
    is_saved_delta,
    parse_object,
    read_adapter,
)
from mergebench.adapters_zoo.packed_file import SUFFIX, PackedFile, is_packed, open_packed_file
from mergebench.checkpoints.containers import DCP, SFT, SHELVED, open_weights
from mergebench.checkpoints.documents import is_file, read_object
from mergebench.checkpoints.hub import HubRef, cached, fetch, is_hub, parse_hub
from mergebench.checkpoints.hub_client import is_offline
from mergebench.checkpoints.layout import Checkpoint, open_checkpoint
from mergebench.checkpoints.stacking import Slice, parse_slices, stack
from mergebench.checkpoints.streamed import open_streamed
from mergebench.core.delta import Delta, Difference, Replacement, reads, tile
from mergebench.core.errors import FormatError, MergebenchError, ParameterError
from mergebench.core.extents import Extent, extents
from mergebench.core.schedule import parse_schedule
from mergebench.core.task_vector import TaskVector
from mergebench.core.tensor import FLOATING, Array, Tensor, size_of

_PIECE = 1 << 20
#: Where a file says that it holds what was collected of a model, under the names of its tensors.
STATISTICS = "mergebench_statistics"
#: Where a folder that was pulled from the Hub says so.
PULLED = "mergebench_origin.json"
#: Files that make a folder a task vector or an adapter without a config: ours, published sparse
#: ones, and diffusers'.
_ALONE = (
    "delta.safetensors",
    SFT,
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)


@dataclass(frozen=True, eq=False)
class Source:
    """An opened input: headers and configs are known, no tensor has been read.

    Attributes
    ----------
    label : str
        The reference as the user wrote it.
    checkpoint : Checkpoint or None
        Full weights; ``None`` for a task vector.
    deltas : TaskVector or None
        What stands on top of the checkpoint, or alone.
    fingerprint : str
        32 hex digits derived from the content, whatever the path.
    config : mapping
        ``adapter_config.json`` of an adapter.
    identity : tuple of mapping
        Name, size and times of each file.
    adapter : AdapterSource or None
        The adapter as its file has it.
    path : Path or None
        Where it lies on this machine, if that is one place.
    revisions : mapping of str to str
        For every reference to the Hub in the label, the commit that was opened.
    packed : PackedFile or None
        What it was unpacked from.
    """

    label: str
    checkpoint: Checkpoint | None
    deltas: TaskVector | None
    fingerprint: str
    config: Mapping[str, Any] = field(default_factory=dict)
    identity: tuple[Mapping[str, Any], ...] = ()
    adapter: AdapterSource | None = None
    path: Path | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)
    packed: PackedFile | None = None


@dataclass(frozen=True, eq=False)
class Applied:
    """A weight with a displacement on top, computed in float32 when read."""

    weight: Tensor
    delta: Delta

    @property
    def dtype(self) -> str:
        """Always F32 (F64 for a weight stored so)."""
        return "F64" if self.weight.dtype == "F64" else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened sum."""
        dtype: np.dtype[Any] = np.dtype(np.float64 if self.dtype == "F64" else np.float32)
        return self.weight.read(start, stop).astype(dtype) + tile(self.delta, start, stop, dtype)

    def extents(self, start: int, stop: int) -> Iterable[Extent]:
        """Where entries ``start:stop`` of the weight lie."""
        return extents(self.weight, start, stop)


def split_weight(text: str) -> tuple[str, Any]:
    """``path:0.3`` into path and weight; a path that exists as written wins.

    The weight may be a gradient over depth, such as ``path:0..1``.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or _exists(Path(text)):
        return text, 1.0
    try:
        if ".." in tail and "/" not in tail:
            return head, parse_schedule(tail, "weight")
        return head, float(tail)
    except (ValueError, ParameterError):
        return text, 1.0


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, dtypes, shapes and a sample of every tensor, 32 hex digits.

    Equal for copies of a model at other paths or in other shards.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors, key=str.encode):
        tensor = tensors[name]
        size = size_of(tensor.shape)
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        for start in sorted({0, size // 3, size // 2, max(size - 128, 0)}):
            piece = tensor.read(start, min(start + 128, size))
            digest.update(np.ascontiguousarray(piece).view(np.uint8).tobytes())
    return digest.hexdigest()


def content(source: Source) -> str:
    """A digest of every entry of an input, 32 hex digits; reads it whole."""
    digest = xxhash.xxh3_128()
    stored = dict(source.checkpoint.tensors) if source.checkpoint is not None else {}
    for name, delta in (source.deltas or {}).items():
        stored |= {f"{name}\0{place}": tensor for place, tensor in enumerate(reads(delta))}
    for name in sorted(stored, key=str.encode):
        size = size_of(stored[name].shape)
        for start in range(0, size, _PIECE):
            piece = stored[name].read(start, min(start + _PIECE, size))
            digest.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return digest.hexdigest()


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
    if _exists(path):
        return _open_path(path, reference, options)
    if slices := parse_slices(reference):
        return _open_slices(reference, slices, options)
    held, mark, task = reference.rpartition("#")
    if mark and task and _exists(Path(held).expanduser()):
        return _open_path(Path(held).expanduser(), reference, replace(options, task=task))
    left, plus, right = reference.rpartition("+")
    if plus and (is_hub(left) or _exists(Path(left).expanduser())):
        return _open_pair(left, right, options)
    if is_hub(reference):
        return _open_hub(parse_hub(reference), reference, options)
    fix = "give a path, hf://org/name, or base+adapter"
    if "=" in reference:
        fix = f"a parameter is written -p {reference}"
    raise MergebenchError(f"{reference}: no such file or folder", fix=fix)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # A name that no file system can hold.
        return False


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


def is_here(reference: str, revisions: Mapping[str, str]) -> bool:
    """Whether an input can be opened without asking the Hub.

    Parameters
    ----------
    reference : str
    revisions : mapping of str to str
        The commits of references to the Hub.
    """
    if _exists(Path(reference).expanduser()):
        return True
    if slices := parse_slices(reference):
        return all(is_here(each.path, revisions) for each in slices)
    left, plus, right = reference.rpartition("+")
    if plus and is_here(left, revisions):
        return is_here(right, revisions)
    if not is_hub(reference):
        return False
    return cached(parse_hub(reference), revisions.get(reference)) is not None


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


def paths_of(label: str) -> tuple[Path, ...]:
    """Every path that a reference names."""
    parts = [each.path for each in parse_slices(label)]
    whole = [part for name in (label, *parts) for part in (name, *name.split("+"))]
    names = [part for name in whole for part in dict.fromkeys((name, name.rpartition("#")[0]))]
    names = [name for name in names if name]
    return tuple(Path(name).expanduser() for name in names)


def _joined(*parts: str) -> str:
    return xxhash.xxh3_128("+".join(parts).encode()).hexdigest()


def with_base(options: ReadOptions, base: Checkpoint) -> ReadOptions:
    """Reading options that know the base's tensor names and shapes."""
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    return replace(options, base_shapes=shapes, base=base.tensors)


def _open_path(path: Path, label: str, options: ReadOptions) -> Source:
    if (adapter := _adapter_at(path, label)) is not None:
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


def open_unread(
    reference: str,
) -> tuple[AdapterSource, tuple[Mapping[str, Any], ...]] | None:
    """The tensors and config of an adapter, not yet understood, and its files; None otherwise."""
    path = Path(reference).expanduser()
    found = _adapter_at(path, reference) if path.exists() else None
    return None if found is None else found[:2]


def _adapter_at(
    path: Path, label: str
) -> tuple[AdapterSource, tuple[Mapping[str, Any], ...], PackedFile | None] | None:
    """The adapter at a path, or ``None`` if it is something else."""
    config: Mapping[str, Any] | None = None
    file = path
    if path.is_dir():
        described = path / "adapter_config.json"
        names = (*_ALONE, *(f"{name}{SHELVED}" for name in _ALONE))
        saved = [each for name in names if (each := path / name).exists()]
        saved = saved or _packed_in(path)
        if not described.exists() and not saved:
            return None
        file = saved[0] if saved else path
        if described.exists():
            config = _config_of(described)
            stored = ("adapter_model.safetensors", f"adapter_model.safetensors{SHELVED}")
            there = [each for name in stored if (each := path / name).exists()]
            pickled = path / "adapter_model.bin"
            if not there and not pickled.exists():
                there = _packed_in(path)
            file = there[0] if there else pickled
        if not file.exists():
            found = sorted(each.name for each in path.iterdir())
            raise FormatError(
                f"{path}: adapter_config.json without adapter_model.safetensors or .bin, or one "
                "packed file",
                got=", ".join(found),
                fix="copy the whole adapter folder",
            )
    elif path.suffix in (".json", ".gguf") or path.name == DCP:
        return None
    opened = open_weights(file)
    packed = None
    tensors: Mapping[str, Tensor] = opened.tensors
    metadata = opened.metadata
    if is_packed(metadata):
        packed = open_packed_file(label, tensors, metadata)
        tensors, metadata = packed.tensors, packed.metadata
    elif config is None and not is_adapter(tensors, config, metadata):
        return None
    identity = {
        "name": file.name,
        "size": opened.size,
        "mtime_ns": opened.mtime_ns,
        "header": opened.header_hash,
    }
    return AdapterSource(label, tensors, config, metadata), (identity,), packed


def packed_at(reference: str) -> PackedFile | None:
    """The packed file at a path, whatever its contents need; ``None`` for anything else.

    Raises
    ------
    MergebenchError
        If nothing is there, or it is damaged.
    """
    path = Path(reference).expanduser()
    if not _exists(path):
        raise MergebenchError(f"{reference}: no such file or folder", fix="give a packed file")
    found = _adapter_at(path, reference)
    return None if found is None else found[2]


def _packed_in(folder: Path) -> list[Path]:
    """The packed file of a folder that holds one, and neither a model nor several."""
    if (folder / "config.json").exists():
        return []
    endings = (SUFFIX, f"{SUFFIX}{SHELVED}")
    found = [each for each in sorted(folder.iterdir()) if each.name.endswith(endings)]
    return found if len(found) == 1 else []


def _config_of(described: Path) -> Mapping[str, Any]:
    config = read_object(described)
    name = config.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise FormatError(f"{described}: base_model_name_or_path", expected="text", got=repr(name))
    return config


def pulled_from(source: Source) -> dict[str, str] | None:
    """Repository and commit that an input's folder was pulled from, if it says so."""
    folder = source.path if source.path is None or source.path.is_dir() else source.path.parent
    if folder is None or not is_file(place := folder / PULLED):
        return None
    try:
        data = read_object(place)
    except MergebenchError:
        # A note beside the weights, which decides nothing.
        return None
    repo, commit = data.get("repo"), data.get("commit")
    return (
        {"repo": repo, "commit": commit}
        if isinstance(repo, str) and isinstance(commit, str)
        else None
    )


def source_of_arrays(label: str, arrays: Mapping[str, Tensor]) -> Source:
    """A source over tensors in memory: a state dict."""
    checkpoint = Checkpoint(
        label=label,
        path=Path(label),
        tensors=dict(arrays),
        shard_of={},
        config=None,
        metadata={},
        side_files=(),
        aliases={},
        identity=(),
    )
    return Source(label, checkpoint, None, fingerprint(arrays))


def source_of_deltas(deltas: TaskVector) -> Source:
    """A source over a task vector that is already open."""
    stored = {
        f"{name}.{place}": tensor
        for name, delta in deltas.items()
        for place, tensor in enumerate(reads(delta))
    }
    return Source(deltas.label, None, deltas, fingerprint(stored))


def base_fingerprint(source: Source) -> str | None:
    """The fingerprint of the base that a saved task vector was taken from, if it says so."""
    if source.deltas is None or source.checkpoint is not None:
        return None
    if not is_saved_delta(source.deltas.metadata):
        return None
    base = parse_object(source.label, FILE_KEY, source.deltas.metadata[FILE_KEY]).get("base")
    mark = base.get("fingerprint") if isinstance(base, dict) else None
    return mark if isinstance(mark, str) else None


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
