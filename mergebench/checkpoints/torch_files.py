"""What PyTorch saved, read without running any of it.

``torch.load(weights_only=True)`` builds tensors and plain containers and calls nothing else that
a file names. Its first versions had holes (CVE-2025-32434, CVE-2026-24747), so an old torch is
refused here rather than trusted.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from mergebench.checkpoints.pickle_scan import HostileError, check_pickle
from mergebench.core.errors import FormatError, MergebenchError, ResourceError

#: torch dtype -> ours, for every dtype that safetensors can hold and mergebench can read.
DTYPES: Mapping[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
AGAIN = "download or copy it again"
_TRUSTED = (2, 10)
_QUOTED = 160
_NAME = re.compile(r"[\w.()]+", re.ASCII)
# A file of torch before 1.6 is five pickles and then the numbers.
_LEGACY_PICKLES = 5
# Warning filters belong to the process, not to the thread.
_FILTERS = threading.Lock()


def dtype_of(where: str, name: str, dtype: Any) -> str:
    """Our name of a torch dtype.

    Parameters
    ----------
    where, name : str
        File and tensor, for the message.
    dtype : torch.dtype

    Raises
    ------
    FormatError
        For one that safetensors cannot hold, such as complex128 or a quantized one.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise FormatError(
            f"{where}: tensor {name!r} has a dtype without a safetensors counterpart",
            expected="one of " + ", ".join(DTYPES),
            got=str(dtype),
            fix="convert it to one of these, or leave it out of the file",
        )
    return found


def load_weights(source: Path | BinaryIO, where: str, *, mmap: bool, location: str = "cpu") -> Any:
    """What ``torch.save`` put into a file, tensors and plain containers only.

    Parameters
    ----------
    source : Path or binary stream
        A stream only without ``mmap``.
    where : str
        Names the file in messages.
    mmap : bool
        Map the file rather than load its numbers.
    location : str, default "cpu"
        Where tensors are put, whatever device they were saved from; ``"meta"`` reads no numbers.

    Raises
    ------
    FormatError
        If it is damaged, or if loading it would call anything: the message lists what.
    MergebenchError
        If the installed torch cannot read untrusted files safely.
    """
    import torch

    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) < _TRUSTED:
        raise MergebenchError(
            f"{where}: this torch may execute code from files of this format (CVE-2026-24747)",
            expected="torch {}.{} or later".format(*_TRUSTED),
            got=torch.__version__,
            fix="upgrade torch, or convert the file to safetensors where you trust it",
        )
    _check(source, where)
    try:
        with _FILTERS, warnings.catch_warnings():
            # They are about how torch reads the file; what it gives is checked afterwards.
            warnings.simplefilter("ignore")
            return torch.load(source, map_location=location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise _refusal(source, where, str(error)) from None
    except MemoryError:
        raise out_of_memory(where) from None
    except OSError:
        raise
    # Whatever a hostile or cut file makes the reader stumble over, it is the file's fault.
    except Exception as error:
        raise _damaged(where, f"{type(error).__name__}: {error}") from error


def _check(source: Path | BinaryIO, where: str) -> None:
    """Refuse pickles that would cost too much before they are obeyed."""
    with ExitStack() as stack:
        stream = stack.enter_context(opened(source)) if isinstance(source, Path) else source
        try:
            for part in _pickles(stream):
                check_pickle(part)
        except HostileError as error:
            raise hostile(where, error) from None
        except OSError:
            raise
        except Exception as error:
            raise _refusal(source, where, f"{type(error).__name__}: {error}") from None
        stream.seek(0)


class _Bounded(io.BufferedReader):
    """Asked for more than there is, Python makes room for all of it first."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return super().read()
        return super().read(min(size, os.fstat(self.fileno()).st_size - self.tell()))


def opened(path: Path) -> BinaryIO:
    """A file open for reading, which takes no more memory than it has bytes."""
    return cast("BinaryIO", _Bounded(io.FileIO(path)))


def hostile(where: str, error: HostileError) -> FormatError:
    """The error for a pickle that would cost more than it could be worth."""
    return FormatError(
        f"{where}: is made to take any amount of time or memory",
        got=str(error),
        fix="do not use it, or convert it to safetensors where it can do no harm",
    )


def out_of_memory(where: str) -> ResourceError:
    """The error for a file that cannot be held in memory."""
    return ResourceError(
        f"{where}: needs more memory than there is to be opened",
        fix="convert it to safetensors on a larger machine, or download it again",
    )


def refused(where: str, names: Iterable[str]) -> FormatError:
    """The error for a pickle that names functions or classes to be called."""
    return FormatError(
        f"{where}: loading it would execute code, which mergebench never does",
        expected="nothing but tensors and plain containers",
        got=", ".join(sorted(names)),
        fix="convert it to safetensors in an environment you trust",
    )


def pickle_globals(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    """(module, name) of every global that one pickle names; nothing is imported or called.

    The stream is left after the pickle. Names that the pickle computes are not seen, so this
    serves messages and not decisions.

    Raises
    ------
    ValueError
        Where it is no pickle, or no longer.
    """
    memo: dict[int, str | None] = {}
    texts: list[str | None] = [None, None]
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name == "STACK_GLOBAL":
            yield texts[-2] or "(computed)", texts[-1] or "(computed)"
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1]
        elif "PUT" in opcode.name:
            memo[int(argument or 0)] = texts[-1]
        elif "GET" in opcode.name:
            texts.append(memo.get(int(argument or 0)))
        elif opcode.stack_after:
            texts.append(argument if isinstance(argument, str) else None)


def unsafe_globals(stream: BinaryIO) -> tuple[list[str], bool]:
    """Globals of a file of torch, or of any pickle, that ``weights_only=True`` does not allow.

    Returns
    -------
    list of str
        ``module.name``, sorted.
    bool
        Whether all pickles of the file could be looked through to their end.
    """
    found: set[tuple[str, str]] = set()
    complete = True
    try:
        for part in _pickles(stream):
            found.update(pickle_globals(part))
    except Exception:
        complete = False
    return _not_allowed(found), complete


def _pickles(stream: BinaryIO) -> Iterator[BinaryIO]:
    if stream.read(4) == b"PK\x03\x04":
        with zipfile.ZipFile(stream) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            yield BytesIO(archive.read(name))
        return
    stream.seek(0)
    for _ in range(_LEGACY_PICKLES):
        yield stream
        at = stream.tell()
        if not stream.read(1):
            return
        stream.seek(at)


def _not_allowed(names: Iterable[tuple[str, str]]) -> list[str]:
    """Torch says which, given a file that does nothing but name them."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    every = set(names)
    # A computed name may be any text; one that is not written so cannot be allowed.
    plain = {each for each in every if all(_NAME.fullmatch(part) for part in each)}
    odd = [".".join(each) for each in every - plain]
    named = [f"c{module}\n{name}\n".encode() for module, name in sorted(plain)]
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"".join(named) + b".")
        archive.writestr("archive/version", b"3\n")
    file.seek(0)
    return sorted([*get_unsafe_globals_in_checkpoint(file), *odd])


def _refusal(source: Path | BinaryIO, where: str, message: str) -> FormatError:
    if isinstance(source, Path):
        with opened(source) as stream:
            names, complete = unsafe_globals(stream)
    else:
        source.seek(0)
        names, complete = unsafe_globals(source)
    if names:
        return refused(where, names)
    reason = message.rsplit("WeightsUnpickler error:", 1)[-1].split("Check the documentation", 1)[0]
    if not complete:
        return _damaged(where, reason)
    return FormatError(
        f"{where}: is pickled in a way that torch's restricted reader does not take",
        got=" ".join(reason.split())[:_QUOTED],
        fix="convert it to safetensors in an environment you trust",
    )


def _damaged(where: str, reason: str) -> FormatError:
    return FormatError(
        f"{where}: is damaged, or was not written by torch.save",
        got=" ".join(reason.split())[:_QUOTED],
        fix=AGAIN,
    )
