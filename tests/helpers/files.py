"""safetensors files written and read without mergebench."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
BF16, F16, F32, F64 = (_DTYPES[name] for name in ("BF16", "F16", "F32", "F64"))


def write(
    path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write arrays in their order; missing folders are made."""
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = dict(metadata)
    position = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())
    return path


def header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file as it stands, and the byte at which the data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def metadata(path: Path) -> dict[str, str]:
    """``__metadata__`` of a file."""
    return dict(header(path)[0].get("__metadata__", {}))


def read(path: Path) -> dict[str, Array]:
    """All tensors of a file, or of a folder: its only safetensors file, or those of its index."""
    if path.is_dir():
        index = next(iter(path.glob("*.safetensors.index.json")), None)
        if index is None:
            (only,) = path.glob("*.safetensors")
            return read(only)
        found: dict[str, Array] = {}
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            found |= read(path / name)
        return found
    entries, start = header(path)
    data = path.read_bytes()[start:]
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], _DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def listing(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden ones included, sorted."""
    return sorted(path.name for path in folder.iterdir())
