"""Files made by hand, and comparisons with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mergebench.checkpoints.placement import Layout, TensorSpec, plan_layout
from mergebench.checkpoints.reader import FileTensor, SafetensorsFile, open_safetensors
from mergebench.checkpoints.writer import Output
from mergebench.core.errors import FormatError
from mergebench.core.tensor import DTYPES, Array, dtype_name, read_all


def build(header: str | bytes | Mapping[str, Any], data: bytes = b"") -> bytes:
    """A file: 8 length bytes, the header as it is, the data."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def put(path: Path, content: bytes) -> Path:
    """Write a file, its folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Random bytes seen as an array; booleans are 0 or 1."""
    random = np.random.default_rng(seed)
    count = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
    top = 2 if dtype == "BOOL" else 256
    return random.integers(0, top, count, np.uint8).view(DTYPES[dtype]).reshape(shape)


def plan_arrays(arrays: Mapping[str, Array], **options: Any) -> Layout:
    """The layout of arrays, in their order."""
    specs = [TensorSpec(name, dtype_name(a.dtype), a.shape) for name, a in arrays.items()]
    return plan_layout(specs, **options)


def save(destination: Path, arrays: Mapping[str, Array], **options: Any) -> Path:
    """Write arrays with our writer: a file if the name ends so, else a folder."""
    single = destination.suffix == ".safetensors"
    chosen = {key: options.pop(key) for key in ("side", "force") if key in options}
    layout = plan_arrays(arrays, **options)
    with Output(destination, layout, single_file=single, **chosen) as output:
        for name, array in arrays.items():
            output.write(name, 0, array)
    return destination


def library_keys(path: Path) -> list[str] | None:
    """Tensor names as the safetensors library sees them, or ``None`` where it refuses."""
    try:
        with safe_open(path, "np") as file:
            return sorted(file.keys())
    except SafetensorError:
        return None


def assert_refused(path: Path, *words: str) -> None:
    """The file is refused in one message that names it, says why, and what to do."""
    with pytest.raises(FormatError) as caught:
        open_safetensors(path)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message
    assert caught.value.fix


def assert_array(actual: Array, expected: Array) -> None:
    """Same dtype, same shape, same bytes."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def assert_tensors(actual: Mapping[str, Any], expected: Mapping[str, Array]) -> None:
    """The same names, and bytes, of tensors read through us."""
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert_array(read_all(actual[name]), array)


def assert_as_library(path: Path) -> SafetensorsFile:
    """Names, metadata, dtypes, shapes and bytes are those the safetensors library gives."""
    ours = open_safetensors(path)
    with safe_open(path, "pt") as theirs:
        assert sorted(theirs.keys()) == sorted(ours.tensors)
        assert dict(theirs.metadata() or {}) == dict(ours.metadata)
        for name, tensor in ours.tensors.items():
            described = theirs.get_slice(name)
            assert described.get_dtype() == tensor.dtype
            assert tuple(described.get_shape()) == tensor.shape
    for name, values in load_file(path).items():
        assert raw_bytes(ours.tensors[name]) == torch_bytes(values)
    return ours


def raw_bytes(tensor: FileTensor) -> bytes:
    """All bytes of a tensor, read through us."""
    return read_all(tensor).tobytes()


def torch_bytes(values: torch.Tensor) -> bytes:
    """All bytes of a torch tensor."""
    return bytes(values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def assert_absent(folder: Path, *allowed: str) -> None:
    """Nothing is in the folder but what is allowed, hidden files included."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(allowed)
