"""What takes the bytes of an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import xxhash

from mergebench.checkpoints.placement import TensorSpec
from mergebench.checkpoints.writer import Output
from mergebench.core.tensor import DTYPES, Array


class Sink(Protocol):
    """Takes the bytes of one output, each tensor from its first byte to its last."""

    def write(self, name: str, byte_start: int, data: Array) -> None:
        """Take the entries of a tensor from byte ``byte_start`` on."""
        ...

    def finish(self, name: str) -> None:
        """Take note that a tensor has all its bytes."""
        ...


class Memory:
    """A sink that keeps tensors as arrays."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.arrays = {spec.name: np.empty(spec.shape, DTYPES[spec.dtype]) for spec in specs}

    def write(self, name: str, byte_start: int, data: Array) -> None:
        """Copy entries into their place."""
        target = self.arrays[name].reshape(-1)
        begin = byte_start // target.itemsize
        target[begin : begin + data.size] = data.reshape(-1)

    def finish(self, name: str) -> None:
        """Nothing is left to do."""


def place_in(sink: Sink, name: str) -> int:
    """The byte of its file at which a tensor begins; 0 in a sink that writes none."""
    return sink.output.layout.places[name].offset if isinstance(sink, Digests) else 0


@dataclass(eq=False)
class Digests:
    """Hashes what passes through on its way to an output; what was there before stays."""

    output: Output
    states: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str, byte_start: int, data: Array) -> None:
        """Hash entries and hand them on."""
        if name in self.output.finished:
            return
        state = self.states.setdefault(name, xxhash.xxh3_128())
        state.update(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self.output.write(name, byte_start, data)

    def finish(self, name: str) -> None:
        """Tell the output, with the digest."""
        self.output.finish(name, self.digest(name))

    def digest(self, name: str) -> str:
        """xxh3-128 of what a tensor holds, 32 hex digits."""
        if name in self.output.finished:
            return self.output.finished[name]
        # An empty tensor has no bytes to pass through.
        return str(self.states.setdefault(name, xxhash.xxh3_128()).hexdigest())

    def digests(self) -> dict[str, str]:
        """Those of all tensors, by name."""
        names = {*self.states, *self.output.finished}
        return {name: self.digest(name) for name in sorted(names)}
