"""Singular triplets as intruders and spectra use them: one convention for signs and for zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mergebench.compute.krylov import leading
from mergebench.compute.spectra import RANK, spectrum
from mergebench.core.tensor import Array


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A thin singular value decomposition ``U · diag(S) · Vt``.

    Attributes
    ----------
    U : float32 or float64 array, (n, r)
        Left vectors, the output side. The largest entry of each is positive, which settles the
        signs that a decomposition leaves open.
    S : float64 array, (r,)
        Singular values, falling; r is the smaller side, or the number of factors.
    Vt : array, (r, m)
        Right vectors in rows, in the dtype of U.
    """

    U: Array
    S: Array
    Vt: Array

    @property
    def rank(self) -> int:
        """How many singular values are above 2⁻²⁰ of the largest: the numerical rank."""
        return numerical_rank(self.S)

    def side(self, side: str) -> Array:
        """Vectors in columns: ``left`` or ``right``."""
        return self.U if side == "left" else self.Vt.T

    def first(self, count: int) -> Decomposition:
        """The leading triplets, copied, so that the others need not stay in memory."""
        return Decomposition(
            self.U[:, :count].copy(), self.S[:count].copy(), self.Vt[:count].copy()
        )

    def transposed(self) -> Decomposition:
        """That of the transposed matrix, signs as they are."""
        return Decomposition(self.Vt.T, self.S, self.U.T)


def numerical_rank(values: Array) -> int:
    """How many of some falling singular values are above 2⁻²⁰ of the largest."""
    if values.size == 0:
        return 0
    return int(np.count_nonzero((values > values[0] * RANK) & (values > 0)))


def decompose(matrix: Array, dtype: Any = np.float32) -> Decomposition:
    """The full decomposition by LAPACK in float64.

    Parameters
    ----------
    matrix : array, (n, m)
        Every entry finite; either side may be 0.
    dtype : float32 (default) or float64
        Of the vectors. Singular values are always float64.
    """
    if 0 in matrix.shape:
        rows, columns = matrix.shape
        return Decomposition(np.zeros((rows, 0)), np.zeros(0), np.zeros((0, columns)))
    U, S, Vt, _ = spectrum(np.asarray(matrix, np.float64))
    return _signed(U, S, Vt, dtype)


def decompose_product(left: Array, right: Array) -> Decomposition:
    """The decomposition of ``left @ right`` from two thin QR decompositions, in float64.

    Parameters
    ----------
    left : float64 array, (n, r)
    right : float64 array, (r, m)

    Returns
    -------
    Decomposition
        Of at most ``min(n, r, m)`` triplets; the others of the product are zero.
    """
    if 0 in left.shape or 0 in right.shape:
        return Decomposition(np.zeros((len(left), 0)), np.zeros(0), np.zeros((0, right.shape[1])))
    Q, R = np.linalg.qr(left)
    P, L = np.linalg.qr(right.T)
    U, S, Vt, _ = spectrum(R @ L.T)
    return _signed(Q @ U, S, Vt @ P.T, np.float64)


def singular_values(matrix: Array) -> Array:
    """Singular values alone, float64, falling."""
    if 0 in matrix.shape:
        return np.zeros(0)
    wide = np.asarray(matrix, np.float64)
    try:
        found: Array = np.linalg.svd(wide, compute_uv=False)
    except np.linalg.LinAlgError:
        found = spectrum(wide).S
    return found


#: Residuals, as shares of squared singular values, that refined triplets reach.
_REFINED = 1e-11
#: Cosines of refined vectors with those they were refined from, at least.
_KEPT = 0.9


def leading_triplets(matrix: Array, block: Array, count: int) -> Decomposition | None:
    """The leading triplets, in float64, refined from vectors that are near them already.

    Parameters
    ----------
    matrix : array, (n, m)
    block : array, (min(n, m), w)
        Near the leading left vectors, or the right ones where ``n > m``; the first ``count`` one
        by one.
    count : int
        At most w.

    Returns
    -------
    Decomposition or None
        ``None`` where they do not converge, or not to what they started from.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = np.asarray(matrix.T if tall else matrix, np.float64)
    found = leading(
        lambda part: np.asarray(wide @ (wide.T @ part)),
        np.asarray(block, np.float64),
        count,
        tolerance=_REFINED,
    )
    found = found.take(np.arange(count))
    alike = np.abs(np.einsum("ij,ij->j", found.vectors, block[:, :count]))
    if np.any(found.residuals > _REFINED * found.values) or np.any(alike < _KEPT):
        return None
    S = np.sqrt(found.values)
    U, Vt = found.vectors, (wide.T @ found.vectors / S).T
    return _signed(Vt.T, S, U.T, np.float64) if tall else _signed(U, S, Vt, np.float64)


def _signed(U: Array, S: Array, Vt: Array, dtype: Any) -> Decomposition:
    peaks = np.abs(U).argmax(axis=0)
    signs = np.where(U[peaks, np.arange(U.shape[1])] < 0, -1.0, 1.0)
    # In place: nobody else holds what LAPACK has just returned, and copies are as large as it.
    U *= signs
    Vt *= signs[:, None]
    return Decomposition(U.astype(dtype, copy=False), S, Vt.astype(dtype, copy=False))
