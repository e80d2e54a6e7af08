"""What a path holds: one checkpoint, whatever its layout on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergebench.checkpoints.containers import Container, choices, is_container, open_weights
from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.documents import is_file, read_object
from mergebench.checkpoints.quantized import refuse_quantized
from mergebench.checkpoints.reader import SafetensorsFile
from mergebench.checkpoints.shards import Opener, open_shards
from mergebench.checkpoints.sides import find_sides, is_weights
from mergebench.checkpoints.ties import find_ties
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.tensor import Tensor

_STEMS = ("model", "diffusion_pytorch_model")
# transformers puts a variant before the suffix, diffusers before ".json" in an index.
_INDEX = re.compile(r"^.+\.index(\.[\w-]+)?\.json$")
_PART = re.compile(r"-(\d+)-of-(\d+)\.\w+$")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A full model on disk, opened without reading its weights.

    Attributes
    ----------
    label : str
        The path as given; how messages call it.
    path : Path
        The same: a file, an index or a folder.
    tensors : mapping of str to Tensor
        All tensors, shards by name and each in the order of its bytes.
    shard_of : mapping of str to str
        Tensor name -> file name, relative to the folder of the weights.
    config : mapping or None
        ``config.json``; ``None`` where there is none.
    config_changed : bool
        Whether it is another than that of the folder, and has to be written.
    metadata : mapping of str to str
        ``__metadata__`` of the files; the first file that has a key wins.
    folder : Path or None
        The model folder; ``None`` for a single file that is not the model of its folder.
    side_files, left_out : tuple of Path
        Files a loader needs besides weights; files not copied on purpose (Python code, links out
        of the folder, weights of further sentence-transformers modules).
    aliases : mapping of str to str
        Tied weights stored twice, as head -> embedding, and names of one PyTorch file that share
        their memory, as name -> the first such name; both sides are in ``tensors``.
    identity : tuple of mapping
        Per file: ``name``, ``size`` in bytes, ``mtime_ns``, ``header_hash``.
    notes : tuple of str
        What is unusual without being wrong.
    """

    label: str
    path: Path
    tensors: Mapping[str, Tensor]
    shard_of: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    side_files: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    identity: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    config_changed: bool = False

    def sides(self) -> dict[str, Path]:
        """Side files by their name in the model folder, with ``/`` between parts."""
        if self.folder is None:
            return {}
        return {path.relative_to(self.folder).as_posix(): path for path in self.side_files}


def open_checkpoint(
    path: Path, *, allow_quantized: bool = False, opener: Opener | None = None
) -> Checkpoint:
    """Open a file of weights, an index of shards, or the folder of a model.

    Headers and configs are read; weights only where the config ties the embeddings and the
    checkpoint stores both sides, which are then compared, and where a PyTorch file cannot be
    mapped, which is noted.

    Parameters
    ----------
    path : Path
        A safetensors file, a PyTorch file (``.bin``, ``.pt``, ``.pth``, ``.ckpt``) or a GGUF
        file; ``*.index.json``; or a folder with ``model.safetensors``,
        ``diffusion_pytorch_model.safetensors``, an index, or exactly one safetensors file; else
        with ``pytorch_model.bin`` or its index, a DCP ``.metadata``, or exactly one file of
        another of these formats. A file of such a name stands for its folder: its config and
        side files are taken too.
    allow_quantized : bool, default False
        Open quantized checkpoints too, to look at them.
    opener : callable, optional
        Opens a file of weights by its name, where only what belongs beside them is at ``path``,
        which is then the path that the file, or the index, has or would have.

    Raises
    ------
    FormatError
        If there is no such checkpoint, or it is unsound or quantized.
    MergebenchError
        If the path does not exist or cannot be read.
    """
    path = Path(path)
    label = str(path)
    weights, folder = _locate(path) if opener is None else (path, path.parent)
    notes: tuple[str, ...] = ()
    files: Mapping[str, SafetensorsFile | Container]
    if _INDEX.match(weights.name):
        files, notes = open_shards(weights, opener)
    else:
        opened = open_weights(weights) if opener is None else opener(weights.name)
        files = {weights.name: opened}
        if _is_part(weights.name):
            notes = (f"{weights.name} is one shard of several; the others are not opened",)
    tensors: dict[str, Tensor] = {}
    shard_of: dict[str, str] = {}
    metadata: dict[str, str] = {}
    shared: dict[str, str] = {}
    for file, content in files.items():
        tensors.update(content.tensors)
        shard_of.update(dict.fromkeys(content.tensors, file))
        metadata = {**content.metadata, **metadata}
        if isinstance(content, Container):
            shared |= content.aliases
            notes += content.notes
    config = None
    if folder is not None and is_file(folder / "config.json"):
        config = read_object(folder / "config.json")
    if not allow_quantized:
        refuse_quantized(label, config, tensors)
    ties, tied = find_ties(config, tensors)
    aliases = {**shared, **{head: shared.get(origin, origin) for head, origin in ties.items()}}
    sides, left_out = find_sides(folder) if folder is not None else ((), ())
    return Checkpoint(
        label=label,
        path=path,
        tensors=tensors,
        shard_of=shard_of,
        config=config,
        metadata=metadata,
        folder=folder,
        side_files=sides,
        left_out=left_out,
        aliases=aliases,
        identity=tuple(
            {
                "name": name,
                "size": content.size,
                "mtime_ns": content.mtime_ns,
                "header_hash": content.header_hash,
            }
            for name, content in files.items()
        ),
        notes=notes + tied + tuple(f"{left} is not copied" for left in left_out),
    )


def _locate(path: Path) -> tuple[Path, Path | None]:
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise cannot("opened", path, error) from error
    if is_folder:
        return _weights_in(path), path
    if not exists:
        raise MergebenchError(
            f"{path}: no such file or folder", fix="check the spelling of the path"
        )
    name = path.name
    if _stem(name) == "adapter_model":
        raise _adapter(path)
    if _INDEX.match(name):
        return path, path.parent
    own = _stem(name) in _STEMS or (_stem(name) in ("pytorch_model", "") and is_container(name))
    return path, path.parent if own else None


def _weights_in(folder: Path) -> Path:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if is_file(entry))
    except OSError as error:
        raise cannot("listed", folder, error) from error
    found = _among(str(folder), names)
    if found is None:
        raise _nothing_in(folder, names)
    return folder / found


def weights_among(label: str, names: list[str]) -> str:
    """The file, of a folder with these names, that is its checkpoint, or the index of it.

    Raises
    ------
    FormatError
        If there is none, or more than one.
    """
    found = _among(label, names)
    if found is None:
        raise FormatError(f"{label}: holds no weights that can be read", got=some(names))
    return found


def _among(label: str, names: list[str]) -> str | None:
    found = [name for name in names if _stem(name) != "adapter_model"]
    singles = [name for name in found if name.endswith(".safetensors")]
    indexes = [name for name in found if _INDEX.match(name) and ".safetensors." in name]
    plain = [f"{stem}.safetensors" for stem in _STEMS]
    plain_indexes = [f"{stem}.safetensors.index.json" for stem in _STEMS]
    # Names without a variant come first, then any index, then a single file of any name.
    for choice in (
        [name for name in found if name in plain or name in plain_indexes],
        indexes,
        singles,
        *choices(names),
    ):
        if len(choice) == 1 and not _is_part(choice[0]):
            return choice[0]
        if choice:
            raise FormatError(
                f"{label}: more than one checkpoint, or a part of one, is in the folder",
                expected="model.safetensors, or one index and its shards, or one safetensors file",
                got=some(choice),
                fix="pass the file or the index instead of the folder",
            )
    return None


def _nothing_in(folder: Path, names: list[str]) -> MergebenchError:
    if "adapter_config.json" in names or any(_stem(name) == "adapter_model" for name in names):
        return _adapter(folder)
    if "model_index.json" in names:
        parts = sorted(
            part.name
            for part in folder.iterdir()
            if part.is_dir() and any(part.glob("*.safetensors"))
        )
        return FormatError(
            f"{folder}: is a diffusers pipeline, which holds several models",
            got=some(parts),
            fix="pass the folder of one of its models",
        )
    others = [name for name in names if is_weights(name)]
    return FormatError(
        f"{folder}: no safetensors file in the folder",
        got=some(others or names),
        fix="convert the model to safetensors" if others else "pass the folder of the model",
    )


def _adapter(path: Path) -> FormatError:
    return FormatError(
        f"{path}: is an adapter, not a checkpoint",
        expected="a full model",
        fix="pass it where a task vector is expected",
    )


def _stem(name: str) -> str:
    """The name up to its first dot, so that variants (``model.fp16.safetensors``) match."""
    return name.split(".", 1)[0]


def _is_part(name: str) -> bool:
    match = _PART.search(name)
    return match is not None and int(match[2]) > 1


def some(names: list[str]) -> str:
    """The first few of some names, in words."""
    if not names:
        return "nothing"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
