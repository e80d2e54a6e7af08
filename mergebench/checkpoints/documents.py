"""Files beside the weights."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.header import MAX_HEADER, parse_strict
from mergebench.core.errors import FormatError
from mergebench.core.plain import parse_json


def is_file(path: Path) -> bool:
    """Whether there is a regular file; False also where the system refuses to say."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_bounded(path: Path, limit: int = MAX_HEADER) -> bytes:
    """The bytes of a regular file.

    Raises
    ------
    FormatError
        If it holds more than ``limit`` bytes, or is no regular file: a pipe would never end.
    OSError
        If the system cannot read it.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise FormatError(f"{path}: is not a regular file", fix="pass a file")
    # A file may grow between the two calls.
    with path.open("rb") as file:
        raw = file.read(min(about.st_size, limit) + 1)
    if len(raw) > limit:
        raise FormatError(
            f"{path}: is too large", expected=f"at most {limit} bytes", got=f"{about.st_size}"
        )
    return raw


def read_object(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Parameters
    ----------
    path : Path
        The file.
    strict : bool, default False
        Refuse repeated keys, infinities and NaN. Configs in the wild hold infinities.

    Raises
    ------
    FormatError
        If it is no JSON object, or larger than 100 MB.
    MergebenchError
        If the system cannot read it.
    """
    try:
        raw = read_bounded(path)
    except OSError as error:
        raise cannot("read", path, error) from error
    if raw.startswith(b"version https://git-lfs"):
        raise FormatError(
            f"{path}: is a Git-LFS pointer", expected="a JSON object", fix="run `git lfs pull`"
        )
    try:
        text = raw.decode("utf-8")
        parsed = parse_strict(text) if strict else parse_json(text)
    except ValueError as error:
        raise FormatError(
            f"{path}: is not sound JSON", got=str(error), fix="download it again or correct it"
        ) from None
    if not isinstance(parsed, dict):
        raise FormatError(
            f"{path}: does not hold a JSON object",
            got=type(parsed).__name__,
            fix="download it again or correct it",
        )
    return parsed


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none, in place of what stood there.

    Raises
    ------
    MergebenchError
        If it cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As :func:`write_text`, of bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot("written", path, error) from None
