"""What is combined of each tensor: weights or displacements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Space = Literal["weight", "delta"]


@dataclass(frozen=True)
class Spaces:
    """The space of each tensor.

    Attributes
    ----------
    rest : weight or delta
        Of tensors that are not in ``apart``.
    apart : mapping of tensor name to weight or delta
    """

    rest: Space
    apart: Mapping[str, Space] = field(default_factory=dict)

    def at(self, name: str) -> Space:
        """The space of one tensor."""
        return self.apart.get(name, self.rest)

    @property
    def used(self) -> tuple[Space, ...]:
        """Every space that a tensor has."""
        return tuple(sorted({self.rest, *self.apart.values()}))
