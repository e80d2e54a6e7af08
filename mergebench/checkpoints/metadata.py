"""The ``.metadata`` file of a DCP folder: a pickle, read without calling what it names."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mergebench.checkpoints.pickle_scan import HostileError, check_pickle
from mergebench.checkpoints.torch_files import (
    AGAIN,
    hostile,
    out_of_memory,
    pickle_globals,
    refused,
)
from mergebench.core.errors import FormatError

_METADATA = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
# Plain records of torch and of the standard library: making one of them does nothing else.
_RECORDS = frozenset(
    {
        *(
            f"{_METADATA}.{name}"
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "MetadataIndex",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        # Where torch before 2.3 kept the properties of a tensor.
        f"{_SHARDED}.TensorProperties",
        f"{_SHARDED}.MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.serialization._get_layout",
        "torch.Size",
        "collections.OrderedDict",
    }
)
# Where the checkpoint was saved; on this system it may be no path at all.
_PATHS: Mapping[str, type] = {
    "PosixPath": PurePosixPath,
    "PurePosixPath": PurePosixPath,
    "WindowsPath": PureWindowsPath,
    "PureWindowsPath": PureWindowsPath,
}


def parse_metadata(path: Path, content: bytes) -> Any:
    """The ``torch.distributed.checkpoint.Metadata`` in the bytes of a ``.metadata`` file.

    Only records that torch itself puts there are made, whose fields hold whatever the file says.

    Raises
    ------
    FormatError
        If the file names anything else (all of it is listed), or is damaged.
    """
    try:
        check_pickle(BytesIO(content))
        names = set(pickle_globals(BytesIO(content)))
    except HostileError as error:
        raise hostile(str(path), error) from None
    except Exception as error:
        raise damaged(path, error) from error
    if unknown := {f"{module}.{name}" for module, name in names if _known(module, name) is None}:
        raise refused(str(path), unknown)
    try:
        found = _Unpickler(BytesIO(content)).load()
    except _NotAllowed as error:
        raise refused(str(path), [str(error)]) from None
    except MemoryError:
        raise out_of_memory(str(path)) from None
    # Whatever a hostile or cut file makes pickle stumble over, it is the file's fault.
    except Exception as error:
        raise damaged(path, error) from error
    from torch.distributed.checkpoint.metadata import Metadata

    if (
        not isinstance(found, Metadata)
        or not isinstance(getattr(found, "state_dict_metadata", None), dict)
        or not isinstance(getattr(found, "storage_data", None), dict)
    ):
        raise damaged(path, f"a {type(found).__name__}")
    return found


class _NotAllowed(Exception):  # noqa: N818  (it never leaves this module)
    """A name that only shows while the pickle is read."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _known(module, name)
        if found is None:
            raise _NotAllowed(f"{module}.{name}")
        return found


def _known(module: str, name: str) -> Any:
    if module in ("pathlib", "pathlib._local"):
        return _PATHS.get(name)
    if f"{module}.{name}" in _RECORDS:
        return getattr(importlib.import_module(module), name, None)
    if module == "torch":
        import torch

        found = getattr(torch, name, None)
        return found if isinstance(found, torch.dtype) else None
    return None


def damaged(path: Path, what: object) -> FormatError:
    """The error for metadata that make no sense; ``what`` is what was found, or an exception."""
    got = f"{type(what).__name__}: {what}" if isinstance(what, Exception) else str(what)
    return FormatError(
        f"{path}: is damaged, or is no metadata of torch.distributed.checkpoint",
        got=got.split("\n", 1)[0][:200],
        fix=AGAIN,
    )
