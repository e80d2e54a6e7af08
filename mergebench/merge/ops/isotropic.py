"""Isotropic: give every singular value of a matrix their mean."""

from __future__ import annotations

from mergebench.compute.matrices import Kernels, as_matrices, as_stack, is_matrix, matrix_shape
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE, Over, spectrum, svd_bytes
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


def _workspace(models: int, rows: int, columns: int) -> int:
    return svd_bytes(rows, columns) + 16 * (models + 1) * rows * columns


@op(granularity="tensor", equivariant="both", workspace=_workspace, tolerance=TOLERANCE)
def isotropic(stack: Stack, at: At, over: Over = "rank", kernels: Kernels = "vector") -> Stack:
    """``U diag(σ) Vᵀ → σ̄ U Vᵀ`` for matrices; other tensors are left as they are.

    Parameters
    ----------
    over : rank or full
        Whether σ̄ is the mean of the singular values that are not zero, which keeps the nuclear
        norm, or their sum over the smaller side of the matrix. Directions whose singular value is
        zero stay zero in both: there, any other choice would be arbitrary.
    kernels : vector or matrix
        Whether kernels of convolutions are left as they are, or taken as out × (in · ∏ kernel).
    """
    if not is_matrix(at.site, kernels):
        return stack
    xp = namespace(stack)
    matrices = as_matrices(stack, at.site, at.core)
    made = []
    for model in range(matrices.shape[0]):
        found = spectrum(matrices[model, :, :])
        present = xp.astype(found.present, found.S.dtype)
        count = (
            xp.sum(present)
            if over == "rank"
            else xp.sum(present) * 0 + min(matrix_shape(at.site.shape))
        )
        mean = xp.sum(found.S * present) / (count + xp.astype(count == 0, count.dtype))
        made.append(found.product(xp.ones_like(found.S) * mean))
    return as_stack(xp.stack(made), at.site, stack)
