"""Folders of ``torch.distributed.checkpoint`` (DCP): ``.metadata`` and ``*.distcp`` files.

A tensor lies there in chunks, each a small file of ``torch.save`` inside a large one. What the
chunks are is known from the metadata; where the numbers of a chunk lie, from its own zip
directory; so any range is read by position, without a process group and without the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.checkpoints.chunks import Chunk, ChunkedTensor
from mergebench.checkpoints.containers import DCP, Container, foreign, read_head
from mergebench.checkpoints.descriptors import Handle, cannot
from mergebench.checkpoints.metadata import damaged, parse_metadata
from mergebench.checkpoints.shards import shard_path
from mergebench.checkpoints.state_dict import WRAPPERS, some
from mergebench.checkpoints.torch_files import AGAIN, dtype_of
from mergebench.core.errors import FormatError
from mergebench.core.tensor import Tensor

_OPTIMIZERS = frozenset(
    {
        "optim",
        "optimizer",
        "optimizers",
        "optimizer_state",
        "optimizer_states",
        "optimizer_state_dict",
        "optim_state_dict",
    }
)
_PREFIXES = (*((wrapper,) for wrapper in WRAPPERS), ("app", "model"))


def open_dcp(folder: Path) -> Container:
    """Open a DCP folder; only ``.metadata`` is read.

    Names are torch's flattened ones (``a.b`` for ``{"a": {"b": …}}``). Where all tensors stand
    under one of ``model``, ``app.model``, ``module``, ``state_dict`` or ``model_state_dict`` (as a
    nested dict, not as a part of their names) that wrapper is removed and noted. Optimizer states
    and what is no tensor are left out and noted.

    Raises
    ------
    FormatError
        If the metadata are damaged or would execute code; if a file is missing or too short; if
        the chunks of a tensor do not cover it exactly; for dtypes that safetensors cannot hold.
    MergebenchError
        If the system cannot read a file.
    """
    path = folder / DCP
    head = read_head(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise cannot("read", path, error) from error
    if not content.startswith(b"\x80"):
        raise foreign(path, head.start, "the metadata of torch.distributed.checkpoint")
    found = parse_metadata(path, content)
    files = _Files(path)
    tensors: dict[str, Tensor] = {}
    try:
        wanted, notes = _select(folder, found.state_dict_metadata, _paths(found))
        for name, key in wanted.items():
            tensors[name] = _tensor(path, key, found, files)
    # The records are torch's, but their fields hold whatever the file says.
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
    digest = hashlib.blake2b(content, digest_size=16)
    stats = []
    for name in sorted(files.opened):
        stats.append(about := files.opened[name].stat())
        digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return Container(
        path=path,
        tensors=tensors,
        header_hash=digest.hexdigest(),
        size=head.size + sum(about.st_size for about in stats),
        mtime_ns=max([head.mtime_ns, *(about.st_mtime_ns for about in stats)]),
        notes=notes,
    )


def _paths(found: Any) -> dict[str, tuple[str, ...]]:
    """Where each entry stood before torch flattened the state dict."""
    planned = found.planner_data if isinstance(found.planner_data, Mapping) else {}
    paths = {}
    for key in found.state_dict_metadata:
        path = planned.get(key)
        parts = tuple(map(str, path)) if isinstance(path, tuple) else ()
        # Without a plan the keys were saved as they are, so dots in them nest nothing.
        paths[key] = parts if parts and ".".join(parts) == key else (key,)
    return paths


def _select(
    folder: Path, entries: Mapping[str, Any], paths: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Tensor names with their keys in the metadata, and notes."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    kept, states, others = [], [], []
    for key, entry in entries.items():
        if _is_optimizer(paths[key]):
            states.append(key)
        elif isinstance(entry, TensorStorageMetadata):
            kept.append(key)
        else:
            others.append(key)
    if not kept:
        raise FormatError(
            f"{folder}: holds no tensors of a model",
            got=some([*states, *others]),
            fix="save the model's state dict too",
        )
    notes, label = [], folder.absolute().name
    if states:
        notes.append(f"{label}: left out the optimizer's state, {some(states, 1)}")
    if others:
        notes.append(f"{label}: left out what is no tensor: " + some(others))
    for prefix in _PREFIXES:
        depth = len(prefix)
        if all(paths[key][:depth] == prefix and len(paths[key]) > depth for key in kept):
            wrapper = ".".join(prefix)
            notes.append(f"{label}: the weights are those under {wrapper!r}")
            return {key.removeprefix(wrapper + "."): key for key in kept}, tuple(notes)
    return {key: key for key in kept}, tuple(notes)


def _is_optimizer(path: Sequence[str]) -> bool:
    top = path[1:] if path[0] == "app" else path
    # Flat names, of a state dict that was flattened before it was saved.
    return bool(top) and (top[0] in _OPTIMIZERS or top[0].split(".", 1)[0] in _OPTIMIZERS)


class _Files:
    """The ``.distcp`` files that are needed, each checked once."""

    def __init__(self, metadata: Path) -> None:
        self.metadata = metadata
        self.opened: dict[str, Handle] = {}

    def get(self, name: str, end: int) -> Handle:
        handle = self.opened.get(name)
        if handle is None:
            head = read_head(shard_path(self.metadata, name))
            handle = self.opened[name] = head.handle
        if (size := handle.stat().st_size) < end:
            raise FormatError(
                f"{handle.path}: is cut", expected=f"{end} bytes", got=f"{size}", fix=AGAIN
            )
        return handle


def _tensor(path: Path, key: str, found: Any, files: _Files) -> ChunkedTensor:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    entry = found.state_dict_metadata[key]
    shape = tuple(entry.size)
    dtype = dtype_of(str(path), key, entry.properties.dtype)
    chunks = []
    for part in entry.chunks:
        stored = found.storage_data.get(MetadataIndex(key, part.offsets))
        if stored is None:
            raise _unsound(path, key, f"chunk {tuple(part.offsets)} is stored nowhere")
        if stored.transform_descriptors:
            raise FormatError(
                f"{path}: tensor {key!r} is stored through an extension",
                got=", ".join(map(str, stored.transform_descriptors)),
                expected="plain chunks",
                fix="save it again without extensions",
            )
        handle = files.get(stored.relative_path, stored.offset + stored.length)
        starts, sizes = tuple(part.offsets), tuple(part.sizes)
        chunks.append(Chunk(key, dtype, starts, sizes, handle, stored.offset, stored.length))
    if gap := _gap(shape, chunks):
        raise _unsound(path, key, gap)
    return ChunkedTensor(key, dtype, shape, tuple(chunks))


def _gap(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> str:
    """Why chunks do not cover a shape exactly once; empty if they do."""
    covered = 0
    for chunk in chunks:
        ends = [start + size for start, size in zip(chunk.starts, chunk.sizes, strict=True)]
        inside = len(ends) == len(shape) and all(
            0 <= start <= end <= extent
            for start, end, extent in zip(chunk.starts, ends, shape, strict=True)
        )
        if not inside:
            return f"chunk {chunk.starts} of shape {chunk.sizes} lies outside of shape {shape}"
        covered += prod(chunk.sizes)
    if covered != prod(shape):
        return f"its chunks hold {covered} of {prod(shape)} entries"
    if not shape or len(chunks) < 2:
        return ""
    starts = np.array([chunk.starts for chunk in chunks if prod(chunk.sizes)])
    ends = starts + np.array([chunk.sizes for chunk in chunks if prod(chunk.sizes)])
    for one in range(len(starts)):
        meets = (starts[one] < ends[one + 1 :]) & (starts[one + 1 :] < ends[one])
        if meets.all(axis=1).any():
            return f"chunk {tuple(map(int, starts[one]))} overlaps another"
    return ""


def _unsound(path: Path, key: str, got: str) -> FormatError:
    return FormatError(
        f"{path}: tensor {key!r} is not stored whole",
        got=got,
        fix="make sure that every rank finished its save, or download the folder again",
    )
