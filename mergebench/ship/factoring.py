"""Factors in their canonical gauge, and updates cut to the rank that keeps their energy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mergebench.adapters_zoo.adapter import FILE_KEY
from mergebench.adapters_zoo.kinds.delta import LEFT, RIGHT, delta_metadata
from mergebench.compute.decompose import spectrum_of_product, truncate
from mergebench.core.tensor import Array
from mergebench.merge.energy import rank_of
from mergebench.ship.pieces import Contents, Piece


def _unheard(entries: int) -> None:
    del entries


def _held(piece: Piece, array: Array) -> Piece:
    """A piece with other values, in memory."""
    wide = np.dtype(np.float64 if piece.dtype == "F64" else np.float32)
    flat = np.ascontiguousarray(array, wide).reshape(-1)
    return replace(piece, read=lambda start, stop: flat[start:stop])


def canonical(
    contents: Contents, energy: float = 1.0, rank: int = 0, step: Callable[[int], None] = _unheard
) -> Contents:
    """The factors of a LoRA as ``U√S`` and ``√S Vᵀ`` of their product.

    (B, A) and (BM, M⁻¹A) are one update, so what is rounded depends on a choice that training
    leaves open; this one balances both factors and orders them by weight.

    Parameters
    ----------
    contents : Contents
    energy : float in (0, 1], default 1.0
        Share of each update's Σσ² that is kept; the columns of B and rows of A beyond are zero.
    rank : int, default 0
        At most so many are kept; 0 for any number.
    step : callable
        Told the entries of every pair.
    """
    pieces = dict(contents.pieces)
    for left, right in contents.pairs.values():
        one, two = pieces[left], pieces[right]
        B = one.read(0, one.size).reshape(one.shape[0], -1)
        A = two.read(0, two.size).reshape(two.shape[0], -1)
        U, S, Vt = spectrum_of_product(B, A)
        kept = rank_of(S, energy) if energy < 1 else S.size
        kept = min(kept, rank or kept)
        root = np.sqrt(S[:kept])
        D, C = np.zeros(B.shape), np.zeros(A.shape)
        D[:, :kept], C[:kept] = U[:, :kept] * root, root[:, None] * Vt[:kept]
        pieces[left], pieces[right] = _held(one, D), _held(two, C)
        step(one.size + two.size)
    return replace(contents, pieces=pieces)


def factored(
    contents: Contents, energy: float, rank: int = 0, step: Callable[[int], None] = _unheard
) -> Contents:
    """A task vector with every matrix that becomes smaller by it as a product of two.

    The rank of each is the least that keeps ``energy`` of Σσ². Factors are held in memory.
    """
    about: dict[str, Any] = json.loads(contents.metadata[FILE_KEY])
    pieces: dict[str, Piece] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, piece in contents.pieces.items():
        rows = piece.shape[0] if len(piece.shape) > 1 else 0
        made = None
        if piece.displacement and rows and piece.size:
            made = _cut(piece, rows, energy, rank)
            step(piece.size)
        if made is None:
            pieces[name] = piece
            continue
        shapes[name] = piece.shape
        for end, factor in zip((LEFT, RIGHT), made, strict=True):
            plain = Piece(name + end, factor.shape, piece.dtype, piece.read)
            pieces[name + end] = _held(plain, factor)
    metadata = delta_metadata(about["base"], replaced=about["replaced"], lowrank=shapes)
    return replace(contents, pieces=pieces, metadata=_with(contents.metadata, metadata))


def _with(metadata: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    return {**metadata, **more}


def _cut(piece: Piece, rows: int, energy: float, rank: int) -> tuple[Array, Array] | None:
    """Two factors of a displacement; ``None`` if they are as large as it."""
    matrix = piece.read(0, piece.size).reshape(rows, -1)
    full = min(matrix.shape)
    most = min(rank or full, piece.size // sum(matrix.shape))
    if not most:
        return None
    left, right, _ = truncate(matrix, full)
    # Both carry the root of the singular values.
    values = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1)
    kept = min(rank_of(values, energy), rank or full)
    return (left[:, :kept], right[:kept]) if kept <= most else None
