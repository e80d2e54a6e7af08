"""Opened inputs: checkpoints, task vectors, adapters on checkpoints; and their fingerprints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mergebench.adapters_zoo.adapter import FILE_KEY, AdapterSource, is_saved_delta, parse_object
from mergebench.adapters_zoo.packed_file import PackedFile
from mergebench.checkpoints.documents import is_file, read_object
from mergebench.checkpoints.layout import Checkpoint
from mergebench.core.delta import Delta, reads, tile
from mergebench.core.errors import MergebenchError
from mergebench.core.extents import Extent, extents
from mergebench.core.task_vector import TaskVector
from mergebench.core.tensor import Array, Tensor, nbytes, read_runs, size_of

_PIECE = 1 << 20
#: Where a file says that it holds what was collected of a model, under the names of its tensors.
STATISTICS = "mergebench_statistics"
#: Where a folder that was pulled from the Hub says so.
PULLED = "mergebench_origin.json"


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


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, dtypes, shapes and a sample of every tensor, 32 hex digits.

    Equal for copies of a model at other paths or in other shards.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors, key=str.encode):
        tensor = tensors[name]
        size = size_of(tensor.shape)
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        starts = sorted({0, size // 3, size // 2, max(size - 128, 0)})
        spans = [(start, min(start + 128, size)) for start in starts]
        room = np.empty(nbytes(tensor.dtype, (4 * 128,)), np.uint8)
        digest.update(read_runs(tensor, spans, room).view(np.uint8).data)
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
