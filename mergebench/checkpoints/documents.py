"""Files beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.header import MAX_HEADER, parse_strict
from mergebench.core.errors import FormatError


def is_file(path: Path) -> bool:
    """Whether there is a regular file; False also where the system refuses to say."""
    try:
        return path.is_file()
    except OSError:
        return False


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
        size = path.stat().st_size
        if size > MAX_HEADER:
            raise FormatError(
                f"{path}: is too large", expected=f"at most {MAX_HEADER} bytes", got=f"{size}"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise cannot("read", path, error) from error
    if raw.startswith(b"version https://git-lfs"):
        raise FormatError(
            f"{path}: is a Git-LFS pointer", expected="a JSON object", fix="run `git lfs pull`"
        )
    try:
        text = raw.decode("utf-8")
        parsed = parse_strict(text) if strict else json.loads(text)
    except (ValueError, RecursionError) as error:
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
