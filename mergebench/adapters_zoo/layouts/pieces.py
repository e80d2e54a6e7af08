"""Tensors and updates put together from rows of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from mergebench.adapters_zoo.layouts.tables import Shape, Span
from mergebench.core.delta import Delta, Dense, Difference, LowRank, Replacement, tile
from mergebench.core.errors import MismatchError
from mergebench.core.extents import Extent, extents
from mergebench.core.tensor import DTYPES, Array, Tensor, size_of


@dataclass(frozen=True, eq=False)
class Piece:
    """An update of a tensor of the other layout, and the rows of the base that it means."""

    name: str
    delta: Delta
    span: Span


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of base tensors as one tensor; read from them when asked.

    Attributes
    ----------
    shape : tuple of int
    parts : tuple of (Tensor, Span)
        All of one dtype.
    """

    shape: Shape
    parts: tuple[tuple[Tensor, Span], ...]

    @property
    def dtype(self) -> str:
        """That of the base."""
        return self.parts[0][0].dtype

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor."""
        values = np.empty(stop - start, DTYPES[self.dtype])
        width = prod(self.shape[1:])
        for tensor, span in self.parts:
            low, high = max(start, span.at * width), min(stop, (span.at + span.rows) * width)
            if low < high:
                shift = (span.start - span.at) * width
                values[low - start : high - start] = tensor.read(low + shift, high + shift)
        return _into(values, out)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Where entries ``start:stop`` lie."""
        width = prod(self.shape[1:])
        for tensor, span in self.parts:
            low, high = max(start, span.at * width), min(stop, (span.at + span.rows) * width)
            if low < high:
                shift = (span.start - span.at) * width
                yield from extents(tensor, low + shift, high + shift)


@dataclass(frozen=True, eq=False)
class Placed:
    """Updates of some rows, zero elsewhere, computed when read.

    Attributes
    ----------
    shape : tuple of int
    pieces : sequence of Piece
        Dense or low-rank updates, or replacements, of disjoint rows.
    dtype : str
    """

    shape: Shape
    pieces: Sequence[Piece]
    dtype: str

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened update."""
        values = np.zeros(stop - start, DTYPES[self.dtype])
        width = prod(self.shape[1:])
        for piece in self.pieces:
            span = piece.span
            low, high = max(start, span.start * width), min(stop, (span.start + span.rows) * width)
            if low < high:
                shift = (span.at - span.start) * width
                part = _entries(piece.delta, low + shift, high + shift, values.dtype)
                values[low - start : high - start] = part
        return _into(values, out)


@dataclass(frozen=True, eq=False)
class Deferred:
    """A small tensor put together when it is read."""

    shape: Shape
    dtype: str
    make: Callable[[], Array]

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened tensor."""
        return _into(self.make().astype(DTYPES[self.dtype]).reshape(-1)[start:stop], out)


def assembled(label: str, name: str, shape: Shape, pieces: Sequence[Piece]) -> Delta:
    """Updates of rows as one update of a tensor; low-rank ones stay in factors.

    Raises
    ------
    MismatchError
        If some rows are replaced and others are not.
    """
    low = [p.delta for p in pieces if isinstance(p.delta, LowRank) and not p.delta.transposed]
    if len(low) == len(pieces):
        return _stacked(shape, pieces, low)
    wide = "F64" if any(_dtype(piece.delta) == "F64" for piece in pieces) else "F32"
    replaced = [piece for piece in pieces if isinstance(piece.delta, Replacement)]
    if not replaced:
        return Dense(Placed(shape, pieces, wide))
    if len(replaced) < len(pieces) or sum(p.span.rows for p in pieces) != shape[0]:
        raise MismatchError(
            f"{label}: {replaced[0].name} is given in full, but it is only a part of {name}",
            expected="all of its parts in full",
            fix="use the base in the layout that the adapter was trained on",
        )
    dtypes = {_dtype(piece.delta) for piece in pieces}
    return Replacement(Placed(shape, pieces, dtypes.pop() if len(dtypes) == 1 else wide))


def _stacked(shape: Shape, pieces: Sequence[Piece], low: Sequence[LowRank]) -> LowRank:
    """``[B₁ 0; 0 B₂] [A₁; A₂]``; pieces of one update share their A."""
    distinct = list(dict.fromkeys(low))
    offsets = [0]
    for delta in distinct:
        offsets.append(offsets[-1] + delta.rank)
    # One scale stays apart, so that the factors keep the digits they were stored with.
    exact = len({delta.scale for delta in distinct}) == 1
    scale = distinct[0].scale if exact else 1.0

    def down() -> Array:
        return np.concatenate([_matrix(delta.A, delta.rank) for delta in distinct])

    def up() -> Array:
        parts = [_matrix(delta.B, delta.B.shape[0]) for delta in distinct]
        out = np.zeros((shape[0], offsets[-1]), np.result_type(np.float32, *parts))
        for piece, delta in zip(pieces, low, strict=True):
            place, span = distinct.index(delta), piece.span
            rows = parts[place][span.at : span.at + span.rows].astype(out.dtype)
            columns = slice(offsets[place], offsets[place + 1])
            out[span.start : span.start + span.rows, columns] = (
                rows if exact else rows * delta.scale
            )
        return out

    kernel = distinct[0].A.shape[1:]
    A = Deferred((offsets[-1], *kernel), _common([d.A for d in distinct], kept=True), down)
    ones = distinct[0].B.shape[2:]
    B = Deferred((shape[0], offsets[-1], *ones), _common([d.B for d in distinct], kept=exact), up)
    return LowRank(B, A, scale, shape)


def _common(tensors: Sequence[Tensor], *, kept: bool) -> str:
    """The dtype that all have if their values are kept, else a wide one."""
    found = {tensor.dtype for tensor in tensors}
    if len(found) == 1 and kept:
        return found.pop()
    return "F64" if "F64" in found else "F32"


def _matrix(tensor: Tensor, rows: int) -> Array:
    return tensor.read(0, size_of(tensor.shape)).reshape(rows, -1)


def _entries(delta: Delta, start: int, stop: int, dtype: np.dtype[np.floating]) -> Array:
    if isinstance(delta, Replacement):
        return delta.values.read(start, stop).astype(dtype)
    return tile(delta, start, stop, dtype)


def _dtype(delta: Delta) -> str:
    if isinstance(delta, LowRank):
        return "F64" if "F64" in (delta.A.dtype, delta.B.dtype) else "F32"
    return (delta.finetuned if isinstance(delta, Difference) else delta.values).dtype


def _into(values: Array, out: Array | None) -> Array:
    if out is None:
        return values
    place = out[: values.nbytes].view(values.dtype)
    place[:] = values
    return place
