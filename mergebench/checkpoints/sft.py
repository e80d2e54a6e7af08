"""``pytorch_diff.bin``, the published files of composable sparse fine-tuning (arXiv:2110.07560).

A pickle of ``{"diffs": {name: {"size", "index_steps", "values"}}, "abs": {name: tensor}}``. Places
are those of the tensor flattened with its first dimension running fastest, each given as the step
from the one before.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.checkpoints.containers import SFT, Container, read_head
from mergebench.checkpoints.header import MAX_HEADER
from mergebench.checkpoints.pickle_scan import HostileError, check_pickle
from mergebench.checkpoints.sft_pickle import DIMS, ENDLESS, ForeignError, Reader, Stored
from mergebench.checkpoints.torch_files import AGAIN, hostile, refused
from mergebench.core.errors import FormatError
from mergebench.core.tensor import DTYPES, FLOATING, Array, ArrayTensor, Tensor

#: Readers of these files count places in 32 bits.
MOST = 2**31 - 1
_KEY = "mergebench"
_PARTS = {"diffs", "abs"}
_ENTRY = {"size", "index_steps", "values"}
# Bytes of the unpacked records per byte of the file.
_RATIO, _SMALL = 16, 1 << 20


def open_sft(path: Path) -> Container:
    """Open a published sparse fine-tuning; its places and values are read into memory.

    Raises
    ------
    FormatError
        If the file is damaged or of another layout, names anything to be called, or if places lie
        outside of their tensors or come twice.
    MergebenchError
        If the system cannot read it.
    """
    head = read_head(path)
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            found, read = _loaded(where, archive, head.size)
            tensors, about = _converted(where, found, read)
            mark = "".join(f"{record.CRC:08x}" for record in archive.infolist())
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as error:
        raise _damaged(where, str(error)) from None
    return Container(
        path=path,
        tensors=tensors,
        header_hash=_digest(mark),
        size=head.size,
        mtime_ns=head.mtime_ns,
        metadata={"format": "pt", _KEY: json.dumps(about, sort_keys=True)},
        notes=(f"{path.name}: places and values are read into memory as a whole",),
    )


def _digest(text: str) -> str:
    import hashlib

    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _damaged(where: str, reason: str) -> FormatError:
    return FormatError(
        f"{where}: is damaged, or no sparse fine-tuning of a torch of 1.6 or later",
        got=" ".join(reason.split())[:160],
        fix=AGAIN,
    )


def _loaded(
    where: str, archive: zipfile.ZipFile, size: int
) -> tuple[Any, Callable[[Stored, str], Array]]:
    """What the pickle holds, and a function that reads its tensors."""
    records = {record.filename: record for record in archive.infolist()}
    unpacked = sum(record.file_size for record in records.values())
    held = [name for name in records if name.endswith("/data.pkl")]
    if len(held) != 1:
        raise _damaged(where, f"{len(held)} records data.pkl in it")
    pickled = held[0]
    if unpacked > max(_RATIO * size, _SMALL) or records[pickled].file_size > MAX_HEADER:
        raise hostile(where, HostileError("it unpacks to far more than it is"))
    prefix = pickled.removesuffix("data.pkl")
    if f"{prefix}byteorder" in records and archive.read(f"{prefix}byteorder") != b"little":
        raise _damaged(where, "numbers of another byte order")
    text = archive.read(pickled)
    try:
        check_pickle(io.BytesIO(text))
        found = Reader(io.BytesIO(text)).load()
    except HostileError as error:
        raise hostile(where, error) from None
    except ForeignError as error:
        raise refused(where, [str(error)]) from None
    except MemoryError:
        raise hostile(where, HostileError("it asks for all memory")) from None
    # Whatever a cut or hostile pickle makes the reader stumble over, it is the file's fault.
    except Exception as error:
        raise _damaged(where, f"{type(error).__name__}: {error}") from None

    def read(stored: Stored, name: str) -> Array:
        dtype = DTYPES[stored.storage.dtype]
        record = records.get(f"{prefix}data/{stored.storage.key}")
        # Along a dimension of one entry any stride will do.
        strides = [s if n > 1 else 0 for n, s in zip(stored.shape, stored.strides, strict=True)]
        last = stored.offset + sum((n - 1) * s for n, s in zip(stored.shape, strides, strict=True))
        there: int = 0 if record is None else record.file_size // dtype.itemsize
        count: int = prod(stored.shape)
        if count > there or (count and last >= there):
            raise FormatError(
                f"{where}: {name} has a shape that its numbers do not fill",
                expected=f"at most {there} numbers",
                got=str(stored.shape)[:80],
                fix=AGAIN,
            )
        if record is None or not count:
            return np.zeros(stored.shape, dtype)
        flat = np.frombuffer(archive.read(record), dtype, there)[stored.offset :]
        steps = [step * dtype.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(flat, stored.shape, steps).copy()

    return found, read


def _converted(
    where: str, found: Any, read: Callable[[Stored, str], Array]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata as files of the kind ``sparse`` have them."""
    if not isinstance(found, dict) or not found.keys() <= _PARTS or not found:
        raise FormatError(
            f"{where}: is of another layout than composable-sft writes",
            expected="diffs and abs",
            got=", ".join(map(repr, found))[:80] if isinstance(found, dict) else "no mapping",
            fix="save it again with a current composable-sft",
        )
    diffs, whole = found.get("diffs", {}), found.get("abs", {})
    for part in (diffs, whole):
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            raise _damaged(where, "diffs and abs are no tensors by name")
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, entry in diffs.items():
        if not isinstance(entry, dict) or entry.keys() != _ENTRY:
            raise _damaged(where, f"{name} is not made of size, index_steps and values")
        if not isinstance(entry["values"], Stored):
            raise _damaged(where, f"{name} has no values")
        shape = _size(where, name, entry["size"])
        places = _places(where, name, shape, entry["index_steps"])
        values = read(entry["values"], name)
        if values.shape != places.shape:
            raise FormatError(
                f"{where}: {name} has another number of values than of places",
                expected=f"values of shape {places.shape}",
                got=str(values.shape)[:80],
                fix=AGAIN,
            )
        order = np.argsort(places)
        shapes[name] = list(shape)
        tensors[f"{name}.sparse_indices"] = ArrayTensor(places[order])
        tensors[f"{name}.sparse_values"] = ArrayTensor(values[order])
    for name, stored in whole.items():
        if not isinstance(stored, Stored) or stored.storage.dtype not in FLOATING:
            raise _damaged(where, f"{name} holds no numbers")
        if name in shapes:
            raise FormatError(f"{where}: {name} is stored both sparse and whole")
        tensors[name] = ArrayTensor(read(stored, name))
    about = {"kind": "sparse", "version": 1, "base": None, "shapes": shapes}
    return tensors, {**about, "replaced": sorted(whole)}


def _size(where: str, name: str, size: Any) -> tuple[int, ...]:
    fits = isinstance(size, list | tuple) and all(type(n) is int and n >= 0 for n in size)
    if not fits or len(size) > DIMS or max((1, *size)) >= ENDLESS or prod(size) >= ENDLESS:
        raise FormatError(
            f"{where}: {name} has no shape",
            expected=f"up to {DIMS} whole numbers, fewer than 2^62 entries",
            got=repr(size)[:80],
        )
    return tuple(size)


def _places(where: str, name: str, shape: tuple[int, ...], steps: Any) -> Array:
    """Row-major places, in the order of the file, from steps with the first dimension fastest."""
    if not isinstance(steps, list | tuple) or not all(type(step) is int for step in steps):
        raise _damaged(where, f"{name} has no index_steps")
    wrong = next((step for step in steps[1:] if step <= 0), None)
    if wrong is not None or (steps and steps[0] < 0):
        what = "comes twice" if wrong == 0 else "lies before the one before it"
        raise FormatError(
            f"{where}: a place of {name} {what}", expected="rising places, each once", fix=AGAIN
        )
    # The sum is the last place, as exact as Python's integers.
    if steps and (last := sum(steps)) >= prod(shape):
        raise FormatError(
            f"{where}: a place of {name} lies outside of the tensor",
            expected=f"places from 0 to {prod(shape) - 1}",
            got=str(last)[:80],
            fix=AGAIN,
        )
    flat = np.cumsum(np.array(steps, np.int64))
    if not steps or not shape:
        return flat
    return np.ravel_multi_index(np.unravel_index(flat, shape, order="F"), shape).astype(np.int64)


def sft_bytes(
    diffs: Mapping[str, tuple[tuple[int, ...], Array, Array]], whole: Mapping[str, Array]
) -> bytes:
    """A file as composable-sft reads it.

    Parameters
    ----------
    diffs : mapping of tensor name to (shape, places, values)
        Rising row-major places, float32 or float64 values.
    whole : mapping of tensor name to array
        Stored as they are, float32 or float64.

    Raises
    ------
    FormatError
        For a tensor of more entries than its readers can number.
    """
    import torch

    encoded = {}
    for name, (shape, places, values) in diffs.items():
        if prod(shape) > MOST:
            raise FormatError(
                f"{name}: has more entries than readers of {SFT} can number",
                expected=f"at most {MOST}",
                got=str(prod(shape)),
                fix="write --format safetensors",
            )
        flat = places
        if shape:
            flat = np.ravel_multi_index(np.unravel_index(places, shape), shape, order="F")
        order = np.argsort(flat)
        steps = np.diff(flat[order], prepend=0) if flat.size else flat
        encoded[name] = {
            "size": torch.Size(shape),
            "index_steps": steps.tolist(),
            "values": torch.from_numpy(values[order]),
        }
    stream = io.BytesIO()
    tensors = {name: torch.from_numpy(array) for name, array in whole.items()}
    torch.save({"diffs": encoded, "abs": tensors}, stream)
    return stream.getvalue()
