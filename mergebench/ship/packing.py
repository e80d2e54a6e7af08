"""What a packed file says of how it was packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import FILE_KEY, parse_object
from mergebench.checkpoints.reader import open_safetensors


@dataclass(frozen=True)
class Packing:
    """How an adapter was packed.

    Attributes
    ----------
    bytes, before : int
        Of the packed file, and of what it was packed from.
    about : mapping
        Scheme, relative error and cosine, as they were measured then.
    """

    bytes: int
    before: int
    about: Mapping[str, Any]

    def rows(self) -> list[tuple[str, str]]:
        """A table for a model card."""
        found = [("packed by", str(self.about.get("scheme", "mergebench")))]
        found += [
            ("bytes", f"{self.bytes:,}"),
            ("bytes before", f"{self.before:,}"),
            ("times smaller", f"{self.before / max(self.bytes, 1):.1f}"),
        ]
        for key in ("relative_error", "cosine"):
            if isinstance(value := self.about.get(key), (int, float)):
                found.append((key.replace("_", " "), f"{value:.4g}"))
        return found


def packing(path: Path) -> Packing | None:
    """How a file, or the only safetensors file of a folder, was packed; ``None`` if it was not.

    Raises
    ------
    FormatError
        If the file is damaged.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".safetensors":
        return None
    opened = open_safetensors(files[0])
    if FILE_KEY not in opened.metadata:
        return None
    data = parse_object(str(files[0]), FILE_KEY, opened.metadata[FILE_KEY])
    made = data.get("made")
    if data.get("kind") != "packed" or not isinstance(made, Mapping):
        return None
    before = made.get("input_bytes")
    return Packing(opened.size, before if type(before) is int else opened.size, made)
