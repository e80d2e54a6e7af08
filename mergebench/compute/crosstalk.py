"""How far matrices respond to each other's inputs: row spaces, angles and crosstalk.

A matrix out × in answers the inputs in its row space. Where the row spaces of two updates are
orthogonal, neither answers inputs of the other, and their sum does to each what it alone would do
(arXiv:2312.02432, section 3.2).
"""

from __future__ import annotations

from itertools import combinations
from math import sqrt
from typing import Any

import numpy as np

from mergebench.compute.decomposition import Decomposition
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import RANK, Spectrum, spectrum

#: A share of energy that is all of it: nothing is left out but singular values of zero.
_ALL = 1.0
#: Sums of squares round in their last digits.
_ROUNDING = 1e-12


def row_basis(matrix: Any, energy: float = _ALL, scale: Any = None) -> Any:
    """Orthonormal columns that span the row space of a matrix, or its leading part.

    Parameters
    ----------
    matrix : float64 array, (out, in)
    energy : float in (0, 1], default 1
        The fewest singular directions are taken whose squares reach this share of their sum.
    scale : number, optional
        What singular values must not be negligible to; the largest of them by default.

    Returns
    -------
    float64 array, (in, r)
        r is 0 for a matrix of zeros.
    """
    found = spectrum(matrix, scale)
    xp = namespace(found.S)
    return xp.matrix_transpose(found.Vt[: _count(found, energy), :])


def _count(found: Spectrum, energy: float) -> int:
    xp = namespace(found.S)
    size = int(xp.count_nonzero(found.present))
    if energy >= _ALL or size == 0:
        return size
    # Relative to the largest, whose square may lie beyond float64.
    squares = (found.S[:size] / found.S[0]) ** 2
    reached = xp.cumulative_sum(squares)
    before = (reached - squares) / reached[-1]
    return int(xp.count_nonzero(before < energy - _ROUNDING))


def is_negligible(part: Any, whole: Any) -> bool:
    """Whether what is left of a matrix is what rounding leaves of nothing."""
    xp = namespace(part)
    return bool(xp.linalg.vector_norm(part) <= RANK * xp.linalg.vector_norm(whole))


def crosstalk(one: Any, other: Any) -> float:
    """``‖X Yᵀ‖ / (‖X‖ ‖Y‖)`` in Frobenius norms: 0 for orthogonal row spaces, at most 1.

    A matrix of zeros has none.
    """
    xp = namespace(one)
    lengths = [xp.linalg.vector_norm(each) for each in (one, other)]
    if not all(bool(length > 0) for length in lengths):
        return 0.0
    # Divided first, so that products of large entries stay within float64.
    left, right = (
        _narrow(each / length) for each, length in zip((one, other), lengths, strict=True)
    )
    return min(float(xp.linalg.vector_norm(left @ xp.matrix_transpose(right))), 1.0)


def _narrow(matrix: Any) -> Any:
    """A matrix with no more rows than columns and the same Gram matrix.

    ``‖X Yᵀ‖`` of tall matrices is that of their triangular factors: of an embedding the product
    would be tokens × tokens.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        return matrix
    return namespace(matrix).linalg.qr(matrix, mode="reduced")[1]


def crosstalk_bytes(rows: int, columns: int) -> int:
    """Memory of :func:`crosstalk`: both matrices once more, and their product."""
    least = min(rows, columns)
    factors = 8 * rows * columns * 3 if rows > columns else 0
    return 16 * rows * columns + factors + 8 * least * (least + 2 * columns)


def crosstalk_of(one: Decomposition, other: Decomposition) -> float:
    """The same from singular triplets, of matrices that need not be there."""
    if one.rank == 0 or other.rank == 0:
        return 0.0
    a, b = one.S / np.linalg.norm(one.S), other.S / np.linalg.norm(other.S)
    inside = a[:, None] * (one.Vt @ other.Vt.T) * b[None, :]
    return min(float(np.linalg.norm(inside)), 1.0)


def cosine(one: Any, other: Any) -> float:
    """The cosine between two matrices as vectors; 0 where one is zero."""
    xp = namespace(one)
    lengths = [xp.linalg.vector_norm(each) for each in (one, other)]
    if not all(bool(length > 0) for length in lengths):
        return 0.0
    found = float(xp.sum((one / lengths[0]) * (other / lengths[1])))
    return max(-1.0, min(found, 1.0))


def principal_cosines(one: Any, other: Any) -> Any:
    """Cosines of the principal angles between two column spaces with orthonormal bases, falling.

    Empty where a basis is.
    """
    xp = namespace(one)
    inside = xp.astype(xp.matrix_transpose(one) @ other, xp.float64)
    if 0 in inside.shape:
        return xp.zeros((0,), dtype=xp.float64)
    return xp.clip(spectrum(inside).S, 0.0, 1.0)


def overlap(cosines: Any, ranks: tuple[int, int]) -> float:
    """``‖Q_iᵀ Q_j‖ / √min(r_i, r_j)``: 1 where one row space holds the other, 0 where orthogonal.

    Parameters
    ----------
    cosines : array
        As :func:`principal_cosines` gives them.
    ranks : (int, int)
    """
    if min(ranks) == 0:
        return 0.0
    xp = namespace(cosines)
    return min(float(xp.linalg.vector_norm(cosines)) / sqrt(min(ranks)), 1.0)


def pairs(count: int) -> list[tuple[int, int]]:
    """All pairs of ``count`` models."""
    return list(combinations(range(count), 2))
