"""Raw: entries as they are, for what must stay exact."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.adapters_zoo.packing import CODECS, Block, Codec, Head
from mergebench.adapters_zoo.planes import Bytes, damaged
from mergebench.core.tensor import DTYPES, Array


@dataclass(frozen=True, eq=False)
class Raw:
    """A block as its entries."""

    values: Array

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.values.nbytes

    def read(self, start: int, stop: int, out: Array) -> None:
        """Write entries ``start:stop`` of the block."""
        out[:] = self.values[start:stop]


def _pack(coded: Array) -> bytes:
    """From entries in the dtype of the tensor."""
    return coded.tobytes()


def _unpack(where: str, data: Bytes, size: int, head: Head) -> Block:
    dtype = DTYPES[head.dtype]
    if data.size != size * dtype.itemsize:
        raise damaged(where, "has another size than its entries")
    return Raw(data.copy().view(dtype))


CODECS.add(
    "raw",
    Codec(name="raw", tag=b"RAW ", formula="the entry", numbers=0, pack=_pack, unpack=_unpack),
)
