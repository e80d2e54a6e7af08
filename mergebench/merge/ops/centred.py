"""Centred low-rank parts of the task vectors around their mean."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from mergebench.compute.matrices import (
    Kernels,
    as_matrices,
    as_stack,
    is_matrix,
    matrix_shape,
    mean_rows,
)
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE, Over, dimension, spectrum, svd_bytes
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


def _workspace(models: int, rows: int, columns: int) -> int:
    thin = 8 * (rows + columns) * min(rows, columns)
    return 16 * (models + 1) * rows * columns + models * thin + svd_bytes(rows, columns)


@op(
    granularity="tensor",
    reduces=True,
    equivariant="both",
    workspace=_workspace,
    tolerance=TOLERANCE,
)
def centred(
    stack: Stack,
    at: At,
    share: Annotated[float, Interval(gt=0, le=1)] = 0.08,
    lam: float = 1.0,
    over: Over = "rank",
    kernels: Kernels = "vector",
) -> Stack:
    """``τ̄ + λ Σ_i (τ_i - τ̄)_k`` with τ̄ the mean and ``(·)_k`` the k leading singular triplets.

    Parameters
    ----------
    share : float in (0, 1]
        Of r singular values k = ⌊share · r⌋ are kept, at least one.
    lam : float
        Weight of what is added to the mean.
    over : rank or full
        Whether r is the dimension of the space that the centred task vectors span together, or
        the smaller side of the matrix.
    kernels : vector or matrix
        Whether kernels of convolutions are averaged as vectors are, or taken as matrices.
    """
    centre = mean_rows(stack)
    if not is_matrix(at.site, kernels) or stack.shape[0] == 1:
        # Whole, the differences to the mean add up to nothing.
        return centre
    xp = namespace(stack)
    matrices = as_matrices(stack, at.site, at.core)
    middle = xp.sum(matrices, axis=0) / matrices.shape[0]
    scale = xp.max(xp.linalg.vector_norm(matrices, axis=(1, 2)))
    parts = [
        # What rounding leaves of equal task vectors is no direction.
        spectrum(matrices[model, :, :] - middle, scale)
        for model in range(matrices.shape[0])
    ]
    size = dimension(parts, matrix_shape(at.site.shape), over)
    added = xp.zeros_like(middle)
    for part in parts:
        leading = part.leading(max(int(share * size), 1))
        added = added + leading.product(leading.S)
    return as_stack((middle + lam * added)[None, :, :], at.site, stack)
