"""Tensors that are known before they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mergebench.core.errors import FormatError

Array = NDArray[Any]

#: safetensors dtype name -> numpy dtype, for every dtype mergebench can read.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
#: The dtypes that take part in a merge; all others are copied from the base.
FLOATING = frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"})
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a numpy dtype.

    Raises
    ------
    FormatError
        For a dtype that safetensors cannot hold.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        raise FormatError(
            "array dtype has no safetensors counterpart",
            got=str(dtype),
            expected=", ".join(DTYPES),
        ) from None


@runtime_checkable
class Tensor(Protocol):
    """A tensor whose dtype and shape are known and whose entries are read on demand."""

    @property
    def dtype(self) -> str:
        """Stored dtype, a key of :data:`DTYPES`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape; ``()`` for a scalar."""
        ...

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened (row-major) tensor, shape ``(stop-start,)``.

        The stored dtype is kept. With ``out`` (uint8, at least as many bytes) the entries land
        there and the result is a view of it; otherwise the result may be a view of the source
        and must not be written to.
        """
        ...


def size_of(shape: tuple[int, ...]) -> int:
    """Number of entries of a shape."""
    return prod(shape)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes on disk."""
    return DTYPES[dtype].itemsize * prod(shape)


@dataclass(frozen=True, eq=False)
class ArrayTensor:
    """A tensor already in memory, any strides; never written to."""

    array: Array

    @property
    def dtype(self) -> str:
        """Stored dtype, a key of :data:`DTYPES`."""
        return dtype_name(self.array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape; ``()`` for a scalar."""
        return self.array.shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor; a view unless ``out`` is given."""
        flat = self.array.reshape(-1)[start:stop]
        if out is not None:
            target = out[: flat.nbytes].view(flat.dtype)
            target[:] = flat
            return target
        flat.flags.writeable = False
        return flat


def address(array: Array) -> int:
    """The place in memory at which an array begins."""
    found: int = array.__array_interface__["data"][0]
    return found


def read_into(tensor: Tensor, start: int, stop: int, out: Array) -> Array:
    """Entries ``start:stop``, always in ``out``, which is as for :meth:`Tensor.read`."""
    got = tensor.read(start, stop, out)
    if got.size and address(got) != address(out):
        out[: got.nbytes] = np.ascontiguousarray(got).view(np.uint8)
    return out[: got.nbytes].view(DTYPES[tensor.dtype])


def read_runs(tensor: Tensor, spans: Sequence[tuple[int, int]], out: Array) -> Array:
    """Short runs of entries side by side, in stored dtype; ``out`` as for :meth:`Tensor.read`.

    A tensor that has a better way than one by one has a method of this name.
    """
    together = getattr(tensor, "read_runs", None)
    if together is not None:
        found: Array = together(spans, out)
        return found
    room = out
    for start, stop in spans:
        room = room[read_into(tensor, start, stop, room).nbytes :]
    return out[: out.size - room.size].view(DTYPES[tensor.dtype])


def read_all(tensor: Tensor) -> Array:
    """The whole tensor in its stored dtype and shape."""
    return tensor.read(0, size_of(tensor.shape)).reshape(tensor.shape)
