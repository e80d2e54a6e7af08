"""Files beside the weights of a folder that is being written."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

import xxhash

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.disk import flush


def check_side(name: str, taken: Collection[str | None]) -> None:
    """Refuse a name that leaves the folder, or is that of a weights file.

    Raises
    ------
    ValueError
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"side file {name!r} is not inside the folder")
    if name in taken:
        raise ValueError(f"side file {name!r} has the name of a weights file")


def content_of(source: bytes | Path) -> bytes:
    """Bytes, or those of a file that is to be copied.

    Raises
    ------
    MergebenchError
        If it cannot be read.
    """
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise cannot("copied", source, error) from error


def write_side(path: Path, data: bytes) -> str:
    """Write a file and bring it to the disk; xxh3-128 of its bytes.

    Raises
    ------
    OSError
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        flush(file.fileno())
    return xxhash.xxh3_128_hexdigest(data)
