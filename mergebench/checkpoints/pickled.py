"""Files of ``torch.save``: ``.bin``, ``.pt``, ``.pth``, ``.ckpt``.

Zip files are mapped, so that opening one reads nothing but its pickle; those written before
torch 1.6, and archives that were compressed, can only be loaded as a whole.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from mergebench.checkpoints.containers import Container, Head, foreign, read_head
from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.header import MAX_HEADER
from mergebench.checkpoints.state_dict import as_array, find_aliases, find_state_dict
from mergebench.checkpoints.torch_files import (
    AGAIN,
    load_weights,
    opened,
    refused,
    unsafe_globals,
)
from mergebench.core.errors import FormatError
from mergebench.core.tensor import Array, Tensor

_ZIP = b"PK\x03\x04"
_EXPECTED = "a PyTorch file"
# Numbers of a model hardly shrink; zip bombs grow a thousandfold, and by records that overlap more.
_RATIO, _SMALL = 16, 1 << 20


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """One tensor of a PyTorch file, of any strides.

    Attributes
    ----------
    name : str
        Its name in the file.
    array : array
        A view of the mapped file, or of the numbers loaded from it; never written to.
    dtype : str
        Stored dtype, a key of :data:`mergebench.core.tensor.DTYPES`.
    head : Head
        Size and time of the file when it was opened.
    """

    name: str
    array: Array = field(repr=False)
    dtype: str
    head: Head = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape; ``()`` for a scalar."""
        return self.array.shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor, shape ``(stop-start,)``, stored dtype.

        With ``out`` (uint8, at least as many bytes) they land there and the result is a view of
        it; otherwise it may be a view of the file. Any number of threads may read.

        Raises
        ------
        FormatError
            If the file is no longer the one that was opened.
        IndexError
            If the range does not fit: a mistake of the caller.
        """
        if not 0 <= start <= stop <= self.array.size:
            raise IndexError(f"{self.name}: entries {start}:{stop} of {self.array.size}")
        self._check_unchanged()
        flat = flat_range(self.array, start, stop)
        if out is not None:
            target = out[: flat.nbytes].view(flat.dtype)
            target[:] = flat
            return target
        if not flat.flags.aligned:
            flat = flat.copy()
        flat.flags.writeable = False
        return flat

    def _check_unchanged(self) -> None:
        # Touching a mapped page beyond the end of a file that was cut would end the process.
        path = self.head.handle.path
        try:
            now = self.head.absolute.stat()
        except OSError as error:
            raise cannot("read", path, error) from error
        if (now.st_size, now.st_mtime_ns) != (self.head.size, self.head.mtime_ns):
            raise FormatError(
                f"{path}: changed while it was in use",
                expected="the size and modification time seen first",
                fix="start again, and leave the inputs alone while a command runs",
            )


def flat_range(array: Array, start: int, stop: int) -> Array:
    """Entries ``start:stop`` in row-major order; of strided arrays only the rows are copied."""
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    if array.flags.c_contiguous or array.ndim < 2 or start == stop:
        return array.reshape(-1)[start:stop]
    row = prod(array.shape[1:])
    first, last = start // row, -(-stop // row)
    return array[first:last].reshape(-1)[start - first * row : stop - first * row]


def open_pickled(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a PyTorch file by name; see :func:`open_torch_file`."""
    return open_torch_file(path).tensors


def open_torch_file(path: Path) -> Container:
    """Open a file of ``torch.save`` that holds a state dict, on its own or one level down.

    One level down means under ``state_dict``, ``model_state_dict``, ``model`` or ``module``.
    Whatever else stands there is left out and noted. Tensors saved from another device come to
    the CPU; names that share one memory in full are aliases.

    Raises
    ------
    FormatError
        If the file is no PyTorch file, is damaged, holds no state dict or tensors of dtypes or
        layouts that safetensors has not; or if loading it would execute code.
    MergebenchError
        If the system cannot read it, or the installed torch is too old to be trusted with it.
    """
    head = read_head(path)
    if head.start.startswith(_ZIP):
        mark, mapped = _read_directory(path)
        why = "is compressed"
    elif head.start.startswith(b"\x80"):
        mark, mapped = _hash(path), False
        why = "is of the format before torch 1.6"
    else:
        raise _no_torch_file(path, head)
    try:
        found = load_weights(path, str(path), mmap=mapped)
    except OSError as error:
        raise cannot("read", path, error) from error
    state, notes = find_state_dict(path, found)
    if not mapped:
        notes = (f"{path.name}: {why}, so it is loaded into memory as a whole", *notes)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        dtype, array = as_array(str(path), name, tensor)
        tensors[name] = PickledTensor(name, array, dtype, head)
    return Container(
        path=path,
        tensors=tensors,
        header_hash=mark,
        size=head.size,
        mtime_ns=head.mtime_ns,
        aliases=find_aliases(state),
        notes=notes,
    )


def _no_torch_file(path: Path, head: Head) -> FormatError:
    # Pickles of the first protocol start with no mark, and may call things too.
    with opened(path) as stream:
        names, complete = unsafe_globals(stream)
    # A text may look like the start of one.
    if names and complete:
        return refused(str(path), names)
    return foreign(path, head.start, _EXPECTED)


def _check_sizes(path: Path, records: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse archives that unpack to far more than they are."""
    size = path.stat().st_size
    unpacked = sum(record.file_size for record in records)
    pickles = [each.file_size for each in records if each.filename.endswith("/data.pkl")]
    if unpacked > max(_RATIO * size, _SMALL) or max(pickles) > MAX_HEADER:
        raise FormatError(
            f"{path}: would unpack to far more than a model of its size",
            expected=f"at most {_RATIO} times its {size} bytes, {MAX_HEADER} of them in data.pkl",
            got=f"{unpacked} bytes, {max(pickles)} in data.pkl",
            fix="do not use it, or convert it to safetensors where it can do no harm",
        )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _read_directory(path: Path) -> tuple[str, bool]:
    """A hash of names, sizes and checksums of all records, and whether they can be mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise FormatError(
            f"{path}: is a zip archive that is cut or damaged",
            got=str(error),
            fix=f"{AGAIN}, or convert it to safetensors where it opens",
        ) from None
    names = [record.filename for record in records]
    if any(name.endswith("/constants.pkl") for name in names):
        raise FormatError(
            f"{path}: is a TorchScript archive, which holds a program",
            expected="a state dict",
            fix="save its state_dict() as safetensors in an environment you trust",
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise FormatError(
            f"{path}: is a zip archive that torch.save did not write",
            expected="a record data.pkl",
            got=", ".join(names[:4]) or "no records",
            fix="pass the weights file itself",
        )
    _check_sizes(path, records)
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        digest.update(f"{record.filename}\0{record.file_size}\0{record.CRC}\0".encode())
    # torch maps a record wherever it lies, also one that would have to be unpacked.
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    return digest.hexdigest(), stored
