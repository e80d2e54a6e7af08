"""Tucker-decomposed convolutions of LoCon: a core between the two factors (``lora_mid``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from mergebench.adapters_zoo.adapter import AdapterSource
from mergebench.adapters_zoo.dialects import kohya
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import DTYPES, FLOATING, Array, Tensor, read_all


@dataclass(frozen=True, eq=False)
class CoreTimesDown:
    """``A[i, c, …] = Σ_j core[i, j, …] down[j, c]``, the A of an ordinary convolution.

    Attributes
    ----------
    core : Tensor, (r, r, *kernel)
    down : Tensor, (r, channels, 1…)
    """

    core: Tensor
    down: Tensor

    @property
    def dtype(self) -> str:
        """F32, or F64 where a stored part is."""
        return "F64" if "F64" in (self.core.dtype, self.down.dtype) else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """(r, channels, *kernel)."""
        return (self.core.shape[0], self.down.shape[1], *self.core.shape[2:])

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened product, computed in float64."""
        core = read_all(self.core).astype(np.float64)
        down = read_all(self.down).astype(np.float64).reshape(self.down.shape[:2])
        whole = np.einsum("ij...,jc->ic...", core, down).reshape(-1)
        values: Array = whole[start:stop].astype(DTYPES[self.dtype])
        if out is None:
            return values
        place: Array = out[: values.nbytes].view(values.dtype)
        place[:] = values
        return place


def without_cores(source: AdapterSource) -> AdapterSource:
    """The same adapter with every core multiplied into its module's A.

    Raises
    ------
    FormatError
        For a core without ``lora_down``, or one that is none.
    MismatchError
        If core and factor do not fit each other.
    """
    parts = {key: part for key in source.tensors if (part := kohya.parse(key)) is not None}
    downs = {part.module: key for key, part in parts.items() if part.role == "A"}
    cores = {part.module: key for key, part in parts.items() if part.role == "mid"}
    if not cores:
        return source
    tensors = {key: each for key, each in source.tensors.items() if key not in cores.values()}
    for module, key in cores.items():
        if module not in downs:
            raise FormatError(f"{source.label}: {module} has a lora_mid and no lora_down", got=key)
        tensors[downs[module]] = _folded(source.label, key, source.tensors, downs[module])
    return replace(source, tensors=tensors)


def _folded(label: str, key: str, tensors: Mapping[str, Tensor], factor: str) -> Tensor:
    core, down = tensors[key], tensors[factor]
    if len(core.shape) < 3 or 0 in core.shape or core.dtype not in FLOATING:
        raise FormatError(
            f"{label}: {key} is no core of a convolution",
            got=f"{core.dtype} of shape {core.shape}",
            expected="(r, r, *kernel)",
        )
    fits = len(down.shape) > 1 and down.shape[0] == core.shape[1] and prod(down.shape[2:]) == 1
    if not fits or down.dtype not in FLOATING:
        raise MismatchError(
            f"{label}: {factor} does not fit {key} of shape {core.shape}",
            expected=f"({core.shape[1]}, channels) and no kernel",
            got=f"{down.dtype} of shape {down.shape}",
        )
    return CoreTimesDown(core, down)
