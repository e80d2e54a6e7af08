"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replaced(path: Path) -> Iterator[TextIO]:
    """A text file that takes its place when the block ends, and not if that fails.

    What UTF-8 cannot hold is spelt out; line ends are kept as they are written.

    Raises
    ------
    OSError
    """
    with _staged(path) as handle, os.fdopen(
        handle, "w", newline="", encoding="utf-8", errors="backslashreplace"
    ) as file:  # fmt: skip
        yield file


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one go.

    Raises
    ------
    OSError
    """
    with _staged(path) as handle, os.fdopen(handle, "wb") as file:
        file.write(content)


@contextmanager
def _staged(path: Path) -> Iterator[int]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        yield handle
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
