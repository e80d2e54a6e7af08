"""Task singular vectors: keep the leading ones of every task, make them orthogonal, add up."""

from __future__ import annotations

from typing import Literal

from mergebench.compute.matrices import (
    Kernels,
    as_matrices,
    as_stack,
    is_matrix,
    matrix_shape,
    mean_rows,
)
from mergebench.compute.spectra import (
    TOLERANCE,
    Over,
    dimension,
    joined,
    orthogonalized,
    spectrum,
    svd_bytes,
)
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op

Keep = Literal["share", "all"]


def _workspace(models: int, rows: int, columns: int) -> int:
    least = min(rows, columns)
    # Every task's thin factors, and of those joined U and Vt with their polar factors.
    thin = 8 * (rows + columns) * least
    return 8 * models * rows * columns + models * thin + svd_bytes(rows, columns) + 4 * thin


@op(
    granularity="tensor",
    reduces=True,
    equivariant="both",
    workspace=_workspace,
    tolerance=TOLERANCE,
)
def singular_vectors(
    stack: Stack,
    at: At,
    keep: Keep = "share",
    orthogonalize: bool = True,
    over: Over = "rank",
    kernels: Kernels = "vector",
) -> Stack:
    """``Σ U_i S_i V_iᵀ`` over the leading singular triplets, their vectors made orthogonal.

    Parameters
    ----------
    keep : share or all
        Of r singular values each of N tasks keeps the ⌊r / N⌋ largest (at least one), or all.
    orthogonalize : true or false
        Replace the joined U and V by the nearest matrices with orthonormal columns.
    over : rank or full
        Whether r is the dimension of the space that the tasks span together, or the smaller side
        of the matrix.
    kernels : vector or matrix
        Whether kernels of convolutions are averaged as vectors are, or taken as matrices.
    """
    if not is_matrix(at.site, kernels):
        return mean_rows(stack)
    count = stack.shape[0]
    if count == 1:
        # One task keeps everything, and nothing interferes with it.
        return stack
    matrices = as_matrices(stack, at.site, at.core)
    parts = [spectrum(matrices[model, :, :]) for model in range(count)]
    if keep == "share":
        size = dimension(parts, matrix_shape(at.site.shape), over)
        parts = [part.leading(max(size // count, 1)) for part in parts]
    whole = joined(parts)
    if orthogonalize:
        whole = orthogonalized(whole)
    return as_stack(whole.product(whole.S)[None, :, :], at.site, stack)
