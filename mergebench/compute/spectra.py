"""Singular values and vectors as merge methods use them: float64, without regard to signs.

Everything here is written against the array API. Numbers below :data:`RANK` of the largest singular
value count as zero, and directions without a singular value are left out wherever a method would
take arbitrary ones for them: results then do not depend on the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mergebench.compute.namespace import namespace
from mergebench.compute.threads import one_thread

#: Singular values below this share of the largest one are zero: float32 rounds ΔW above it.
RANK = 2.0**-20
#: What another LAPACK may change, relative to the largest entry of a tensor, where singular values
#: are apart.
TOLERANCE = 1e-5
#: What stands for the number of singular values of a matrix: the dimension of the space that all
#: task vectors span together, or the smaller side of the tensor.
Over = Literal["rank", "full"]


class Spectrum(NamedTuple):
    """``U · diag(S) · Vt`` with S falling, U (m, r), Vt (r, n); ``present`` marks S that count."""

    U: Any
    S: Any
    Vt: Any
    present: Any

    def leading(self, count: int) -> Spectrum:
        """The first ``count`` singular triplets."""
        return Spectrum(self.U[:, :count], self.S[:count], self.Vt[:count, :], self.present[:count])

    def product(self, values: Any) -> Any:
        """``U · diag(values) · Vt`` over the triplets that count."""
        xp = namespace(self.U)
        kept = values * xp.astype(self.present, values.dtype)
        return (self.U * kept[None, :]) @ self.Vt


def spectrum(matrix: Any, scale: Any = None) -> Spectrum:
    """The thin singular value decomposition of a float64 matrix.

    Parameters
    ----------
    matrix : array, (m, n)
    scale : number, optional
        What singular values must not be negligible to; the largest of them by default.
    """
    xp = namespace(matrix)
    if isinstance(matrix, np.ndarray):
        U, S, Vt = _lapack(matrix)
    else:
        U, S, Vt = xp.linalg.svd(matrix, full_matrices=False)
    largest = S[:1] if scale is None else scale
    return Spectrum(U, S, Vt, (largest * RANK < S) & (S > 0))


def _lapack(matrix: Any) -> tuple[Any, Any, Any]:
    try:
        return np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        # Divide and conquer gives up on some matrices; the QR iteration does not.
        from scipy.linalg import svd

        with one_thread():
            found: tuple[Any, Any, Any] = svd(
                matrix, full_matrices=False, lapack_driver="gesvd", check_finite=False
            )
        return found


def polar(matrix: Any) -> Any:
    """The nearest matrix with orthonormal columns (rows, if it is wide), of the rank it has.

    Directions that the columns span only once among several of them are shared, none is made up:
    ``P Qᵀ`` over the singular values that count, which is unique.
    """
    found = spectrum(matrix)
    return found.product(namespace(matrix).ones_like(found.S))


def joint_rank(parts: Sequence[Spectrum], full: int) -> int:
    """Dimension of the space that matrices span together, columns or rows, whichever is less."""
    xp = namespace(parts[0].U)
    counts = [int(xp.sum(xp.astype(part.present, xp.int64))) for part in parts]
    if max(counts) == full:
        return full
    ranks = []
    for side in ("U", "Vt"):
        columns = []
        for part, count in zip(parts, counts, strict=True):
            if count:
                vectors = part.U if side == "U" else xp.matrix_transpose(part.Vt)
                columns.append(vectors[:, :count] * (part.S[:count] / part.S[0])[None, :])
        if not columns:
            return 0
        found = spectrum(xp.concat(columns, axis=1))
        ranks.append(int(xp.sum(xp.astype(found.present, xp.int64))))
    return min(ranks)


def dimension(parts: Sequence[Spectrum], shape: tuple[int, int], over: Over) -> int:
    """How many singular values there are to share out (see :data:`Over`)."""
    full = min(shape)
    return full if over == "full" else min(joint_rank(parts, full), full)


def joined(parts: Sequence[Spectrum]) -> Spectrum:
    """Singular triplets of several matrices side by side; those that do not count are left out."""
    xp = namespace(parts[0].U)
    if isinstance(parts[0].U, np.ndarray):
        parts = [
            Spectrum(p.U[:, p.present], p.S[p.present], p.Vt[p.present], p.present[p.present])
            for p in parts
        ]
    marks = [xp.astype(part.present, part.S.dtype) for part in parts]
    return Spectrum(
        xp.concat([p.U * mark[None, :] for p, mark in zip(parts, marks, strict=True)], axis=1),
        xp.concat([p.S * mark for p, mark in zip(parts, marks, strict=True)]),
        xp.concat([p.Vt * mark[:, None] for p, mark in zip(parts, marks, strict=True)], axis=0),
        xp.concat([part.present for part in parts]),
    )


def orthogonalized(parts: Spectrum) -> Spectrum:
    """The same triplets with U and Vt replaced by their polar factors."""
    if parts.S.shape[0] == 0:
        return parts
    return parts._replace(U=polar(parts.U), Vt=polar(parts.Vt))


def svd_bytes(rows: int, columns: int) -> int:
    """Memory of one :func:`spectrum`: the input twice, U, Vt, and LAPACK's own workspace."""
    least = min(rows, columns)
    return 8 * (2 * rows * columns + (rows + columns) * least + 4 * least * least)
