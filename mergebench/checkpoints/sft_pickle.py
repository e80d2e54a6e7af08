"""The pickle of a published sparse fine-tuning, read without importing anything that it names.

Fourteen names of torch, numpy and Python stand for functions of this module, which build lists,
tuples and views of the stored bytes; any other name is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergebench.core.tensor import DTYPES

_STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
}
#: Most dimensions of a tensor, and sizes beyond every file.
DIMS = 8
ENDLESS = 1 << 62


@dataclass(frozen=True)
class Storage:
    """Numbers of one record: our dtype, and the name of the record."""

    dtype: str
    key: str


@dataclass(frozen=True)
class Stored:
    """A tensor that the pickle describes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Number:
    """What stands for ``numpy.dtype``: 4 or 8 bytes of a little-endian integer."""

    __slots__ = ("bytes",)

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("i4", "i8"):
            raise ValueError(f"a number of type {code!r}")
        self.bytes = int(code[1])

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or state[1] not in ("<", "="):
            raise ValueError("a number of another byte order")


def _integer(kind: Any, data: Any = b"") -> int:
    if not isinstance(kind, _Number) or not isinstance(data, bytes) or len(data) != kind.bytes:
        raise ValueError("a number without its bytes")
    return int.from_bytes(data, "little", signed=True)


def _encoded(text: Any, encoding: Any = "") -> bytes:
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise ValueError(f"a text encoded as {encoding!r}")
    return text.encode("latin-1")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor of no storage or shape")
    if len(size) != len(stride) or len(size) > DIMS or max(size, default=0) >= ENDLESS:
        raise ValueError(f"a tensor of shape {size}")
    return Stored(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *_: Any) -> Stored:
    if not isinstance(data, Stored):
        raise ValueError("a parameter without its tensor")  # noqa: TRY004
    return data


def _number(*arguments: Any) -> _Number:
    return _Number(*arguments)


def _shape(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items)


def _mapping(*_: Any) -> dict[Any, Any]:
    return {}


_FUNCTIONS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _shape,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): _mapping,
    ("numpy.core.multiarray", "scalar"): _integer,
    ("numpy._core.multiarray", "scalar"): _integer,
    ("numpy", "dtype"): _number,
    ("_codecs", "encode"): _encoded,
}


class Reader(pickle.Unpickler):
    """An unpickler that knows no name but those above."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; no other is looked up."""
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in _FUNCTIONS:
            raise ForeignError(f"{module}.{name}")
        return _FUNCTIONS[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """Where the numbers of a tensor are."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise ValueError("a storage that torch does not write")
        _, dtype, key, _, _ = pid
        if dtype not in DTYPES or not isinstance(key, str) or not key.isdecimal():
            raise ValueError("a storage that torch does not write")
        return Storage(dtype, key)


class ForeignError(Exception):
    """Names what is not on the list."""
