"""GGUF files of llama.cpp.

Plain numbers are read as they are; quantized blocks become float32, range by range, through the
``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.checkpoints.containers import Container, Head, foreign, read_head
from mergebench.checkpoints.descriptors import Handle
from mergebench.checkpoints.gguf_header import Entry, Header, SwappedError, parse_header
from mergebench.checkpoints.reader import FileTensor
from mergebench.checkpoints.state_dict import some
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.extents import Extent
from mergebench.core.tensor import Array, Tensor

_MAGIC = b"GGUF"
_AGAIN = "download or copy it again"
_PLAIN: Mapping[str, str] = {
    "F16": "F16",
    "BF16": "BF16",
    "F32": "F32",
    "F64": "F64",
    "I8": "I8",
    "I16": "I16",
    "I32": "I32",
    "I64": "I64",
}
# Blocks decoded at a time, so that what decoding needs besides its result stays small.
_PIECE = 1 << 12
# Entries, of at most 8 bytes, that an array may have.
_MOST = 2**60


@dataclass(frozen=True, eq=False)
class BlockTensor:
    """One quantized tensor of a GGUF file, read as float32.

    Attributes
    ----------
    name : str
        Its name in the file.
    kind : gguf.GGMLQuantizationType
        How blocks are encoded.
    shape : tuple of int
        Row-major, as in torch.
    offset : int
        Byte of the file at which it starts.
    entries, size : int
        Entries and bytes of one block.
    """

    name: str
    kind: Any
    shape: tuple[int, ...]
    offset: int
    entries: int
    size: int
    handle: Handle = field(repr=False)

    @property
    def dtype(self) -> str:
        """Always F32."""
        return "F32"

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor, shape ``(stop-start,)``, float32.

        With ``out`` (uint8, at least as many bytes) they land there and the result is a view of
        it. Any number of threads may read. Only blocks that hold a wanted entry are read.

        Raises
        ------
        FormatError
            If the file ends inside the tensor.
        MergebenchError
            If the system cannot read the file.
        IndexError
            If the range does not fit: a mistake of the caller.
        """
        if not 0 <= start <= stop <= prod(self.shape):
            raise IndexError(f"{self.name}: entries {start}:{stop} of {prod(self.shape)}")
        count = stop - start
        flat = (np.empty(4 * count, np.uint8) if out is None else out[: 4 * count]).view(np.float32)
        last = -(-stop // self.entries)
        for block in range(start // self.entries, last if count else 0, _PIECE):
            values = self._decode(block, min(block + _PIECE, last))
            first = block * self.entries
            lo, hi = max(start, first), min(stop, first + len(values))
            flat[lo - start : hi - start] = values[lo - first : hi - first]
        return flat

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Where the blocks of entries ``start:stop`` lie."""
        first, last = start // self.entries, -(-stop // self.entries)
        yield Extent(self.handle, self.offset + first * self.size, (last - first) * self.size)

    def _decode(self, first: int, last: int) -> Array:
        from gguf.quants import dequantize

        raw = np.empty((last - first) * self.size, np.uint8)
        got = self.handle.read_at(raw.data, self.offset + first * self.size)
        if got < raw.size:
            raise FormatError(
                f"{self.handle.path}: the file ends inside tensor {self.name!r}",
                expected=f"{raw.size} bytes",
                got=f"{got}",
                fix="it was cut while in use; " + _AGAIN,
            )
        decoded: Array = dequantize(raw.reshape(1, -1), self.kind)
        return decoded.reshape(-1)


def open_gguf(path: Path) -> Container:
    """Open a GGUF model; its header is read, no tensor.

    Floats and integers keep their dtype; quantized tensors are F32, with a note that names the
    types. Names, and the order of rows where llama.cpp's converter permutes them, stay as they
    are. Metadata are the texts under ``general.``.

    Raises
    ------
    FormatError
        If it is no GGUF model, a part of one, of another byte order, damaged, or quantized in a
        way that the ``gguf`` package cannot decode.
    MergebenchError
        If the ``gguf`` package is missing, or the system cannot read the file.
    """
    head = read_head(path)
    if not head.start.startswith(_MAGIC):
        raise foreign(path, head.start, "a GGUF file")
    package = _package(path)
    header = _parse(path, head)
    _check_kind(path, header.fields)
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, list[str]] = {}
    for entry in header.entries:
        tensors[entry.name] = tensor = _tensor(path, entry, head, package)
        if isinstance(tensor, BlockTensor):
            kinds.setdefault(tensor.kind.name, []).append(entry.name)
    notes = [
        f"{path.name}: dequantized from {kind}: {some(names, 1)}"
        for kind, names in sorted(kinds.items())
    ]
    notes.append(
        f"{path.name}: names are llama.cpp's, and so is the order of rows where its converter "
        "permutes them: combine it only with GGUF files of the same model"
    )
    return Container(
        path=path,
        tensors=tensors,
        header_hash=header.digest,
        size=head.size,
        mtime_ns=head.mtime_ns,
        metadata={
            name: value
            for name, value in header.fields.items()
            if name.startswith("general.") and isinstance(value, str)
        },
        notes=tuple(notes),
    )


def _package(path: Path) -> Any:
    try:
        import gguf.quants
    except ImportError as error:
        raise MergebenchError(
            f"{path}: reading GGUF files needs the gguf package",
            fix="run pip install 'mergebench[gguf]'",
        ) from error
    return gguf


def _parse(path: Path, head: Head) -> Header:
    try:
        return parse_header(head.handle, head.size)
    except SwappedError:
        raise FormatError(
            f"{path}: has another byte order than this machine",
            fix="convert it with gguf-convert-endian",
        ) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is damaged", got=str(error)[:200], fix=_AGAIN) from error


def _check_kind(path: Path, fields: Mapping[str, Any]) -> None:
    if (kind := fields.get("general.type", "model")) not in ("model", "mmproj"):
        raise FormatError(
            f"{path}: is no model",
            expected="general.type model",
            got=str(kind),
            fix="pass the adapter as PEFT saved it" if kind == "adapter" else "pass the model",
        )
    parts, number = fields.get("split.count"), fields.get("split.no")
    if isinstance(parts, int) and parts > 1:
        raise FormatError(
            f"{path}: is one part of a model",
            expected="a whole model",
            got=f"split.no {number} of {parts}",
            fix="join the parts with llama-gguf-split --merge",
        )


def _tensor(path: Path, entry: Entry, head: Head, package: Any) -> FileTensor | BlockTensor:
    name, shape = entry.name, entry.shape
    try:
        kind = package.GGMLQuantizationType(entry.kind)
    except ValueError:
        raise FormatError(
            f"{path}: tensor {name!r} is of a type that the gguf package does not know",
            got=str(entry.kind),
            fix="upgrade gguf, or download the file again",
        ) from None
    entries, size = package.GGML_QUANT_SIZES[kind]
    row = shape[-1] if shape else 1
    if row % entries:
        raise FormatError(
            f"{path}: tensor {name!r} has rows that are no whole blocks of {kind.name}",
            expected=f"a multiple of {entries}",
            got=str(row),
            fix=_AGAIN,
        )
    stop = entry.offset + prod(shape) // entries * size
    if stop > head.size:
        raise FormatError(
            f"{path}: the file is truncated: tensor {name!r} ends after it",
            expected=f"at least {stop} bytes",
            got=str(head.size),
            fix=_AGAIN,
        )
    # Counted without the zeros: numpy multiplies the other extents of an empty array.
    if prod(max(extent, 1) for extent in shape) >= _MOST:
        raise FormatError(
            f"{path}: tensor {name!r} is larger than any array can be",
            got=f"shape {shape}",
            fix=_AGAIN,
        )
    if kind.name in _PLAIN:
        return FileTensor(name, _PLAIN[kind.name], shape, entry.offset, head.handle)
    try:
        package.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        raise FormatError(
            f"{path}: tensor {name!r} is quantized with {kind.name}",
            expected="a type that the gguf package decodes",
            fix="requantize it to F16 or Q8_0 with llama-quantize, or use the original weights",
        ) from None
    return BlockTensor(name, kind, shape, entry.offset, entries, size, head.handle)
