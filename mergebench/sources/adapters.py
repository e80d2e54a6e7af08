"""Adapters, saved task vectors and packed files on disk: which files they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import AdapterSource, is_adapter
from mergebench.adapters_zoo.packed_file import SUFFIX, PackedFile, is_packed, open_packed_file
from mergebench.checkpoints.containers import DCP, SFT, SHELVED, open_weights
from mergebench.checkpoints.documents import read_object
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.tensor import Tensor
from mergebench.sources.references import exists

#: Files that make a folder a task vector or an adapter without a config: ours, published sparse
#: ones, and diffusers'.
_ALONE = (
    "delta.safetensors",
    SFT,
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)


def open_unread(
    reference: str,
) -> tuple[AdapterSource, tuple[Mapping[str, Any], ...]] | None:
    """The tensors and config of an adapter, not yet understood, and its files; None otherwise."""
    path = Path(reference).expanduser()
    found = adapter_at(path, reference) if path.exists() else None
    return None if found is None else found[:2]


def adapter_at(
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
    if not exists(path):
        raise MergebenchError(f"{reference}: no such file or folder", fix="give a packed file")
    found = adapter_at(path, reference)
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
