"""Tensors that are one stored tensor, masked and scaled for one of several tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mergebench.core.errors import FormatError
from mergebench.core.tensor import DTYPES, FLOATING, Array, Tensor, size_of


def mask_bytes(size: int) -> int:
    """How many bytes hold one bit for each of ``size`` entries."""
    return (size + 7) // 8


@dataclass(frozen=True, eq=False)
class Masked:
    """``factor_k · … · factor_1 · mask ⊙ unified``, multiplied from the right, one at a time.

    Attributes
    ----------
    unified : Tensor
        What all tasks share.
    masks : Tensor, (tasks, ⌈size / 8⌉), U8
        One bit for each entry, the first one lowest.
    task : int
        The row of ``masks``.
    factors : tuple of float
        Each rounded to the dtype before it multiplies, as the merge has done it.
    """

    unified: Tensor
    masks: Tensor
    task: int
    factors: tuple[float, ...]

    @property
    def dtype(self) -> str:
        """F64 where the shared tensor is; else F32."""
        return "F64" if self.unified.dtype == "F64" else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the shared tensor."""
        return self.unified.shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor, shape ``(stop-start,)``."""
        dtype: np.dtype[Any] = DTYPES[self.dtype]
        row = self.task * self.masks.shape[1]
        first, last = start // 8, mask_bytes(stop)
        bits = np.unpackbits(self.masks.read(row + first, row + last), bitorder="little")
        kept = bits[start - 8 * first : stop - 8 * first].astype(np.bool_)
        values = self.unified.read(start, stop).astype(dtype)
        values[~kept] = 0
        for factor in self.factors:
            values *= dtype.type(factor)
        if out is None:
            return values
        target: Array = out[: values.nbytes].view(dtype)
        target[:] = values
        return target


def masked(
    where: str, unified: Tensor, masks: Tensor, tasks: int, task: int, factors: tuple[float, ...]
) -> Masked:
    """The tensor of one task.

    Raises
    ------
    FormatError
        If the shared tensor or its masks have other dtypes or sizes than they should.
    """
    if unified.dtype not in FLOATING:
        raise FormatError(f"{where}: what tasks share is not floating-point", got=unified.dtype)
    wanted = (tasks, mask_bytes(size_of(unified.shape)))
    if masks.dtype != "U8" or masks.shape != wanted:
        raise FormatError(
            f"{where}: its masks do not go with it",
            expected=f"U8 of shape {wanted}",
            got=f"{masks.dtype} of shape {masks.shape}",
        )
    return Masked(unified, masks, task, factors)
