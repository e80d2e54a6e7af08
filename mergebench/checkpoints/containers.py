"""Weights in other containers than safetensors: which files they are, and what they look like."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from mergebench.checkpoints.descriptors import Handle, cannot
from mergebench.checkpoints.reader import SafetensorsFile, open_safetensors
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.tensor import Tensor

#: Suffixes of files written by ``torch.save``.
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
#: The file that makes a folder a checkpoint of ``torch.distributed.checkpoint``.
DCP = ".metadata"
#: A published sparse fine-tuning.
SFT = "pytorch_diff.bin"
#: The list that stands for a file of weights on a shelf.
SHELVED = ".shelf"
_GGUF = ".gguf"
_SNIFF = 512
# Longest name of a tensor, and most dots in one. Names are taken apart at their dots, so without
# a limit a small file could ask for any amount of memory.
_LETTERS, _DOTS = 1024, 128
# What trainers save beside the weights.
_BESIDE = (
    "adapter_model*",
    "training_args*",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "random_states*",
)
_CONVERT = "convert it to safetensors"
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a Git-LFS pointer", "run `git lfs pull`"),
    (b"PK\x03\x04", "is a zip archive, such as a PyTorch file", "name it .pt if it is one"),
    (b"\x80", "is a Python pickle, such as an old PyTorch file", "name it .pt if it is one"),
    (b"GGUF", "is a GGUF file", "name it .gguf"),
    (b"\x89HDF", "is an HDF5 file, such as Keras weights", _CONVERT),
    (b"{", "is a JSON file", "pass the weights file itself"),
)


@dataclass(frozen=True, eq=False)
class Container:
    """An opened file, or a DCP folder: no weight has been read unless ``notes`` say so.

    Attributes
    ----------
    path : Path
        As given.
    tensors : mapping of str to Tensor
        In the order of the file.
    header_hash : str
        BLAKE2b-128 of what describes the tensors, 32 hexadecimal digits.
    size, mtime_ns : int
        Bytes of the file and its modification time (of all files, and of the newest).
    metadata : mapping of str to str
        What the file says about itself.
    aliases : mapping of str to str
        Names that share their memory with another one: name -> that one, both in ``tensors``.
    notes : tuple of str
        What was left out or converted.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    header_hash: str
    size: int
    mtime_ns: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Head:
    """The first bytes of a regular file that is not empty.

    Attributes
    ----------
    handle : Handle
        The file.
    absolute : Path
        Where it is, whatever the working directory becomes.
    start : bytes
        Up to 512.
    size, mtime_ns : int
        Bytes, and the modification time in nanoseconds.
    """

    handle: Handle
    absolute: Path
    start: bytes
    size: int
    mtime_ns: int


def is_container(name: str) -> bool:
    """Whether a file of this name is opened by :func:`open_weights` as something else."""
    return name == DCP or Path(name).suffix.lower() in (*PICKLED, _GGUF)


def open_weights(path: Path) -> SafetensorsFile | Container:
    """Open one file of weights by its name.

    ``pytorch_diff.bin`` (sparse), PyTorch, GGUF, DCP ``.metadata``, a list of objects on a shelf,
    else safetensors.

    Raises
    ------
    FormatError
        If a tensor's name has more than 1024 characters or 128 dots.
    MergebenchError
        As the opener of that format raises it.
    """
    opened = _open(path)
    for name in opened.tensors:
        if len(name) > _LETTERS or name.count(".") > _DOTS:
            raise FormatError(
                f"{path}: the name of a tensor is too long",
                expected=f"at most {_LETTERS} characters and {_DOTS} dots",
                got=f"{len(name)} characters and {name.count('.')} dots, {name[:80]!r}",
                fix="do not use this file unless you trust it and can rename the tensor",
            )
    return opened


def _open(path: Path) -> SafetensorsFile | Container:
    suffix = path.suffix.lower()
    if path.name == SFT:
        from mergebench.checkpoints.sft import open_sft

        return open_sft(path)
    if path.name == DCP:
        from mergebench.checkpoints.distributed import open_dcp

        return open_dcp(path.parent)
    if suffix in PICKLED:
        from mergebench.checkpoints.pickled import open_torch_file

        return open_torch_file(path)
    if suffix == SHELVED:
        from mergebench.checkpoints.shelved import open_shelved

        return open_shelved(path)
    if suffix == _GGUF:
        from mergebench.checkpoints.gguf import open_gguf

        return open_gguf(path)
    return open_safetensors(path)


def choices(names: Iterable[str]) -> tuple[list[str], ...]:
    """File names of a folder that may be its checkpoint, by format, the preferred format first.

    ``pytorch_model.bin`` or its index; any other ``.bin`` index; a DCP ``.metadata``; any PyTorch
    file but those a trainer saves beside the weights; any GGUF file. A folder with a PEFT config
    holds an adapter, so it has none.
    """
    found = sorted(names)
    if "adapter_config.json" in found:
        return ()
    plain = [f"{stem}.bin" for stem in ("pytorch_model", "diffusion_pytorch_model")]
    plain += [f"{name}.index.json" for name in plain]
    indexes = [name for name in found if ".bin.index" in name and name.endswith(".json")]
    files = [name for name in found if name.lower().endswith(PICKLED)]
    return (
        [name for name in found if name in plain],
        indexes,
        [DCP] if DCP in found and any(name.endswith(".distcp") for name in found) else [],
        [name for name in files if not any(fnmatchcase(name, pattern) for pattern in _BESIDE)],
        [name for name in found if name.lower().endswith(_GGUF)],
    )


def read_head(path: Path) -> Head:
    """Size, time and first bytes of a file.

    Raises
    ------
    FormatError
        If it is empty or not a regular file.
    MergebenchError
        If the system cannot open or read it.
    """
    try:
        kind = path.stat().st_mode
    except OSError as error:
        raise cannot("opened", path, error) from error
    except ValueError as error:
        raise MergebenchError(f"{str(path)!r}: cannot be opened", got=str(error)) from error
    # Opening a pipe would wait for a writer that never comes.
    if not stat.S_ISREG(kind):
        raise FormatError(f"{path}: is not a regular file", fix="pass a file or a model folder")
    handle = Handle(path)
    about = handle.stat()
    if about.st_size == 0:
        raise FormatError(f"{path}: is empty", fix="download or copy it again")
    buffer = bytearray(min(about.st_size, _SNIFF))
    handle.read_at(memoryview(buffer), 0)
    return Head(handle, path.absolute(), bytes(buffer), about.st_size, about.st_mtime_ns)


def foreign(path: Path, start: bytes, expected: str) -> FormatError:
    """The error for a file whose first bytes are not those of the format its name promises."""
    for magic, what, fix in _FOREIGN:
        if start.startswith(magic):
            return FormatError(f"{path}: {what}", expected=expected, fix=fix)
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return FormatError(
            f"{path}: is a web page, such as a login or error page",
            expected=expected,
            fix="download it again with the access it needs",
        )
    if start[8:9] == b"{":
        return FormatError(
            f"{path}: looks like a safetensors file", expected=expected, fix="name it .safetensors"
        )
    return FormatError(
        f"{path}: is damaged or of another format",
        expected=expected,
        got=f"a file that starts with {start[:16]!r}",
        fix="download or copy it again, or convert the model to safetensors",
    )
