"""Displacements of one tensor, in the structure they were stored in.

A Delta is one of the final classes below. The required primitive is :func:`tile`; everything
else dispatches on the type, so a new routine does not swell the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from math import prod
from typing import Any

import numpy as np

from mergebench.core.tensor import Array, ArrayTensor, Tensor


@dataclass(frozen=True, eq=False)
class Difference:
    """``finetuned - base``, both in their stored dtypes and of one shape."""

    finetuned: Tensor
    base: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the displaced tensor."""
        return self.finetuned.shape


@dataclass(frozen=True, eq=False)
class Dense:
    """A displacement stored entry by entry."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the displaced tensor."""
        return self.values.shape


@dataclass(frozen=True, eq=False)
class LowRank:
    """``scale · B @ A``, reshaped to ``shape`` and transposed first where asked.

    Attributes
    ----------
    B : Tensor, (out, r)
    A : Tensor, (r, in)
    scale : float
        ``lora_alpha / r``, or ``lora_alpha / √r`` where rank-stabilised.
    shape : tuple of int
        Shape of the displaced tensor: ``(out, in)``; ``(in, out)`` if ``transposed``; for a
        convolution ``(out, channels, *kernel)`` with ``in = channels · ∏ kernel``.
    transposed : bool
        True where the weight is stored input × output (``fan_in_fan_out``, embeddings).
    embedding : bool or None
        Whether the module is an embedding, which adapters spell differently; ``None`` if unknown.
    """

    B: Tensor
    A: Tensor
    scale: float
    shape: tuple[int, ...]
    transposed: bool = False
    embedding: bool | None = None

    @property
    def rank(self) -> int:
        """Number of columns of B."""
        return self.B.shape[1]


@dataclass(frozen=True, eq=False)
class Replacement:
    """New values of a tensor, not a difference; becomes one where there is a base."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the replaced tensor."""
        return self.values.shape


Delta = Difference | Dense | LowRank | Replacement

_ROWS = 8


@singledispatch
def tile(delta: object, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    """Entries ``start:stop`` of the flattened displacement, shape ``(stop-start,)``, in ``dtype``.

    Raises
    ------
    TypeError
        For a type that has no displacement without a base (:class:`Replacement`).
    """
    raise TypeError(f"no displacement for {type(delta).__name__}")


@tile.register
def _(delta: Difference, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    out = delta.finetuned.read(start, stop).astype(dtype)
    out -= delta.base.read(start, stop).astype(dtype, copy=False)
    return out


@tile.register
def _(delta: Dense, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    return delta.values.read(start, stop).astype(dtype)


@tile.register
def _(delta: LowRank, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    left, right = factors(delta, np.dtype(np.float64))
    width = right.shape[1]
    out = np.empty(stop - start, dtype)
    # A BLAS may order its sums by the shape of the product, so blocks of rows are cut at fixed
    # places: an entry then never depends on the tile that asked for it.
    for row in range(start // width // _ROWS * _ROWS, -(-stop // width), _ROWS):
        block = (left[row : row + _ROWS] @ right).reshape(-1)
        origin = row * width
        low, high = max(start, origin), min(stop, origin + block.size)
        out[low - start : high - start] = block[low - origin : high - origin]
    return out


def factors(delta: LowRank, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """``(L, R)`` with ``L @ R`` the flattened-to-2-D displacement as stored, scale in L.

    L is (rows, r) and R is (r, columns) of the stored orientation: a transposed weight gives
    ``(scale · Aᵀ, Bᵀ)``.
    """
    rank = delta.rank
    left = delta.B.read(0, prod(delta.B.shape)).reshape(-1, rank).astype(dtype, copy=False)
    right = delta.A.read(0, prod(delta.A.shape)).reshape(rank, -1).astype(dtype, copy=False)
    if delta.transposed:
        left, right = right.T.copy(), left.T.copy()
    return left if delta.scale == 1 else left * dtype.type(delta.scale), right


def resident(delta: Delta) -> Delta:
    """The same displacement with its factors in memory, in float64 and the stored orientation.

    Tiles of it then cost their product alone. Takes ``8 · r · (rows + columns)`` bytes.
    """
    if not isinstance(delta, LowRank):
        return delta
    left, right = factors(delta, np.dtype(np.float64))
    return LowRank(ArrayTensor(left), ArrayTensor(right), 1.0, delta.shape)


def reads(delta: Delta) -> tuple[Tensor, ...]:
    """The stored tensors that a displacement is made of."""
    match delta:
        case Difference(finetuned, base):
            return (finetuned, base)
        case Dense(values) | Replacement(values):
            return (values,)
        case LowRank():
            return (delta.B, delta.A)
