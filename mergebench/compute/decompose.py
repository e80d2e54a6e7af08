"""Matrix decompositions, in float64."""

from __future__ import annotations

from math import sqrt

import numpy as np

from mergebench.compute.threads import one_thread
from mergebench.core.tensor import Array

_BLOCK = 256
#: Gram matrices of a condition below its inverse are decomposed as they are.
_ROUND = 1e-5


def truncate(matrix: Array, rank: int) -> tuple[Array, Array, float]:
    """The best approximation of a given rank in the Frobenius norm (Eckart-Young).

    Parameters
    ----------
    matrix : array, (m, n)
    rank : int
        At most ``min(m, n)`` is used.

    Returns
    -------
    left, right : float64 arrays, (m, r) and (r, n)
        The product is the approximation; both factors carry the square root of the singular
        values.
    residual : float
        ``‖matrix - left @ right‖ / ‖matrix‖``; 0 for a zero matrix.
    """
    from scipy.linalg import eigh

    wide = matrix.shape[0] <= matrix.shape[1]
    work = (matrix if wide else matrix.T).astype(np.float64)
    size = work.shape[0]
    rank = min(rank, size)
    # scipy brings a BLAS of its own, loaded just now: its threads would fight those of the caller.
    with one_thread():
        # The Gram matrix in float64 settles the leading subspace to 1e-8, well below float32.
        _, vectors = eigh(work @ work.T, subset_by_index=(size - rank, size - 1))
    vectors = np.ascontiguousarray(vectors[:, ::-1])
    # eigh leaves signs open; the largest entry of each vector is made positive.
    peaks = np.abs(vectors).argmax(axis=0)
    vectors *= np.where(vectors[peaks, np.arange(rank)] < 0, -1.0, 1.0)
    projected = vectors.T @ work
    norms = np.sqrt(np.linalg.norm(projected, axis=1))
    safe = np.where(norms > 0, norms, 1.0)
    left, right = vectors * norms, projected / safe[:, None]
    total = float(np.linalg.norm(work))
    # Block by block, since the difference is as large as the matrix.
    lost = sum(
        float(np.linalg.norm(work[row : row + _BLOCK] - left[row : row + _BLOCK] @ right)) ** 2
        for row in range(0, size, _BLOCK)
    )
    residual = sqrt(lost) / total if total > 0 else 0.0
    return (left, right, residual) if wide else (right.T, left.T, residual)


def singular_values_of(matrix: Array) -> Array:
    """Singular values, the largest first, float64, by way of the Gram matrix of the smaller side.

    Their squares are exact to float64's precision of the largest square, as shares of a norm need
    them; small values themselves are not.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    work = (matrix if wide else matrix.T).astype(np.float64)
    squares = np.linalg.eigvalsh(work @ work.T)[::-1]
    found: Array = np.sqrt(np.maximum(squares, 0))
    return found


def spectrum_of_product(
    left: Array, right: Array, rank: int | None = None
) -> tuple[Array, Array, Array]:
    """The singular value decomposition of a product of two factors, never multiplied out.

    Two thin QR decompositions and the decomposition of a matrix of the rank's size, in float64.

    Parameters
    ----------
    left, right : arrays, (m, r) and (r, n)
    rank : int, optional
        How many singular vectors to find, all by default.

    Returns
    -------
    U, S, Vt : float64 arrays, (m, j), (k,) and (j, n)
        k is min(m, r, n), and j is k or ``rank``, if that is less; S falls. The largest entry of
        each column of U is positive.
    """
    from scipy.linalg import svd

    # scipy brings a BLAS of its own, loaded just now: its threads would fight those of the caller.
    with one_thread():
        one, two = _Thin(left), _Thin(right.T)
        core = one.triangle @ two.triangle.T
        try:
            U, S, Vt = svd(core, full_matrices=False, lapack_driver="gesdd")
        except np.linalg.LinAlgError:
            # Divide and conquer gives up on some matrices; the QR iteration is slower.
            U, S, Vt = svd(core, full_matrices=False, lapack_driver="gesvd")
        kept = S.size if rank is None else min(rank, S.size)
        U, Vt = one.times(U[:, :kept]), two.times(Vt[:kept].T).T
    peaks = np.abs(U).argmax(axis=0)
    signs = np.where(U[peaks, np.arange(kept)] < 0, -1.0, 1.0)
    return U * signs, S, Vt * signs[:, None]


class _Thin:
    """A thin QR decomposition, of whose Q only products with a few columns are wanted.

    Columns that are nearly orthogonal are decomposed by way of their Gram matrix (Cholesky), which
    costs a fraction and loses at most the square of their condition of float64's digits; all
    others by reflections, which are applied and never written out.
    """

    def __init__(self, matrix: Array) -> None:
        from scipy.linalg import lapack

        self._plain: Array | None = np.asarray(matrix, np.float64)
        gram = self._plain.T @ self._plain
        factor, failed = lapack.dpotrf(gram)
        if not failed:
            share, failed = lapack.dpocon(factor, np.abs(gram).sum(axis=0).max())
        if not failed and share > _ROUND:
            self.triangle: Array = factor
            return
        own = np.array(matrix, np.float64, order="F")
        self._plain = None
        work = int(lapack.dgeqrf_lwork(*matrix.shape)[0])
        self._packed, self._tau, _, _ = lapack.dgeqrf(own, lwork=work, overwrite_a=True)
        self.triangle = np.triu(self._packed[: min(matrix.shape)])

    def times(self, columns: Array) -> Array:
        """``Q @ columns``."""
        from scipy.linalg import lapack

        if self._plain is not None:
            solved: Array = lapack.dtrtrs(self.triangle, columns)[0]
            return np.asarray(self._plain @ solved)
        wide = np.zeros((self._packed.shape[0], columns.shape[1]), order="F")
        wide[: columns.shape[0]] = columns
        if not columns.shape[1]:
            return wide
        given = "L", "N", self._packed[:, : self._tau.size], self._tau
        work = int(lapack.dormqr(*given, wide, lwork=-1)[1][0])
        found: Array = lapack.dormqr(*given, wide, lwork=work, overwrite_c=True)[0]
        return found


def truncate_product(left: Array, right: Array, rank: int) -> tuple[Array, Array, float]:
    """The best approximation of a product of two factors of a given rank; as :func:`truncate`."""
    U, S, Vt = spectrum_of_product(left, right, rank)
    root = np.sqrt(S[:rank])
    total = float(np.linalg.norm(S))
    residual = float(np.linalg.norm(S[rank:])) / total if total > 0 else 0.0
    return U * root, root[:, None] * Vt, residual
