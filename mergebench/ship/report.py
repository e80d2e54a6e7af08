"""What compressing has cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.core.site import make_sites
from mergebench.ship.measure import Error, summed


@dataclass(frozen=True, eq=False)
class Report:
    """What compressing has cost.

    Attributes
    ----------
    path : Path
    scheme : str
    params : mapping
        All parameters, those that were chosen included.
    bytes, before : int
        Of the file, header and all, and of the input's tensors.
    parameters : int
        Entries of all tensors of the file that is unpacked to.
    error : Error
        Of the whole update, read back from what was written.
    tensors : mapping of name to Error
        Of each displaced tensor, or adapted module.
    exact : tuple of str
        Tensors that are stored as they are.
    notes : tuple of str
    """

    path: Path
    scheme: str
    params: Mapping[str, Any]
    bytes: int
    before: int
    parameters: int
    error: Error
    tensors: Mapping[str, Error]
    exact: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.before / self.bytes

    @property
    def bits(self) -> float:
        """Bits of the file per parameter."""
        return 8 * self.bytes / max(self.parameters, 1)

    def layers(self) -> dict[str, Error]:
        """The error of each numbered block, and of the tensors outside of them, by name."""
        sites = make_sites({name: (error.entries,) for name, error in self.tensors.items()})
        groups: dict[str, list[Error]] = {}
        for name, error in self.tensors.items():
            site = sites[name]
            key = f"{site.stack}.{site.block}" if site.block is not None else name
            groups.setdefault(key, []).append(error)
        return {key: summed(each) for key, each in groups.items()}

    def worst(self) -> tuple[str, Error] | None:
        """The tensor of the largest relative error."""
        if not self.tensors:
            return None
        name = max(self.tensors, key=lambda each: self.tensors[each].relative)
        return name, self.tensors[name]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        worst = self.worst()

        def row(error: Error) -> dict[str, Any]:
            return {"relative_error": error.relative, "cosine": error.cosine}

        return {
            "path": str(self.path),
            "scheme": self.scheme,
            "params": dict(self.params),
            "bytes": self.bytes,
            "input_bytes": self.before,
            "ratio": self.ratio,
            "parameters": self.parameters,
            "bits_per_parameter": self.bits,
            **row(self.error),
            "worst": None if worst is None else {"tensor": worst[0], **row(worst[1])},
            "layers": {name: row(error) for name, error in self.layers().items()},
            "tensors": {name: row(error) for name, error in self.tensors.items()},
            "exact": list(self.exact),
            "notes": list(self.notes),
        }
