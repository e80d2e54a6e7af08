"""Matrix decompositions, in float64."""

from __future__ import annotations

from math import sqrt

import numpy as np

from mergebench.core.tensor import Array

_BLOCK = 256


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
    from threadpoolctl import threadpool_limits

    wide = matrix.shape[0] <= matrix.shape[1]
    work = (matrix if wide else matrix.T).astype(np.float64)
    size = work.shape[0]
    rank = min(rank, size)
    # scipy brings a BLAS of its own, loaded just now: its threads would fight those of the caller.
    with threadpool_limits(1):
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


def spectrum_of_product(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """The singular value decomposition of a product of two factors, never multiplied out.

    Two thin QR decompositions and the decomposition of a matrix of the rank's size, in float64.

    Parameters
    ----------
    left, right : arrays, (m, r) and (r, n)

    Returns
    -------
    U, S, Vt : float64 arrays, (m, k), (k,) and (k, n)
        k is at most ``min(m, r, n)``; S falls. The largest entry of each column of U is positive.
    """
    from scipy.linalg import qr, svd

    Q1, R1 = qr(left.astype(np.float64), mode="economic")
    Q2, R2 = qr(right.T.astype(np.float64), mode="economic")
    # gesvd is slower than gesdd, but never fails to converge on matrices this small.
    U, S, Vt = svd(R1 @ R2.T, full_matrices=False, lapack_driver="gesvd")
    U, Vt = Q1 @ U, Vt @ Q2.T
    signs = np.where(U[np.abs(U).argmax(axis=0), np.arange(S.size)] < 0, -1.0, 1.0)
    return U * signs, S, Vt * signs[:, None]


def truncate_product(left: Array, right: Array, rank: int) -> tuple[Array, Array, float]:
    """The best approximation of a product of two factors of a given rank; as :func:`truncate`."""
    U, S, Vt = spectrum_of_product(left, right)
    root = np.sqrt(S[:rank])
    total = float(np.linalg.norm(S))
    residual = float(np.linalg.norm(S[rank:])) / total if total > 0 else 0.0
    return U[:, :rank] * root, root[:, None] * Vt[:rank], residual
