"""Isotropic merging in common and task-specific subspaces."""

from __future__ import annotations

from typing import Annotated, Any

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


def _workspace(models: int, rows: int, columns: int) -> int:
    thin = 8 * (rows + columns) * min(rows, columns)
    # Where inputs lack rank their own factors are needed too, to find what they span.
    return 16 * models * rows * columns + (models + 5) * thin + svd_bytes(rows, columns)


def shares(size: int, common: float, models: int) -> tuple[int, int]:
    """``(common, per task)``: how many of ``size`` directions come from the sum and each task."""
    each = min(round((size - int(common * size)) / models), size // models)
    return size - each * models, each


@op(
    granularity="tensor",
    reduces=True,
    equivariant="both",
    workspace=_workspace,
    tolerance=TOLERANCE,
)
def subspaces(
    stack: Stack,
    at: At,
    common: Annotated[float, Interval(ge=0, le=1)] = 0.8,
    over: Over = "rank",
    kernels: Kernels = "vector",
) -> Stack:
    """``σ̄ U Vᵀ`` with directions of the sum and, off its left ones, directions of every task.

    Parameters
    ----------
    common : float in [0, 1]
        Share of directions taken from the sum; the rest is divided evenly among the tasks.
    over : rank or full
        Whether directions are shared out over the dimension of the space that the tasks span
        together, and σ̄ is the mean of the singular values that count; or both over the smaller
        side of the matrix.
    kernels : vector or matrix
        Whether kernels of convolutions are averaged as vectors are, or taken as matrices.
    """
    if not is_matrix(at.site, kernels):
        return mean_rows(stack)
    xp = namespace(stack)
    matrices = as_matrices(stack, at.site, at.core)
    count = matrices.shape[0]
    total = spectrum(xp.sum(matrices, axis=0))
    size = _size(matrices, total, matrix_shape(at.site.shape), over)
    leading, each = shares(size, common, count)
    shared = total.leading(leading)
    directions = shared.U * xp.astype(shared.present, shared.U.dtype)[None, :]
    parts = []
    for model in range(count):
        matrix = matrices[model, :, :]
        apart = matrix - directions @ (xp.matrix_transpose(directions) @ matrix)
        # What rounding leaves of a task inside the common space is no direction of its own.
        parts.append(spectrum(apart, xp.linalg.vector_norm(matrix)).leading(each))
    whole = joined([*parts, shared])
    found = xp.sum(xp.astype(whole.present, whole.S.dtype)) if over == "rank" else size
    mean = xp.sum(whole.S) / (found + (found == 0))
    whole = orthogonalized(whole)
    merged = whole.product(xp.ones_like(whole.S) * mean)
    return as_stack(merged[None, :, :], at.site, stack)


def _size(matrices: Any, total: Any, shape: tuple[int, int], over: Over) -> int:
    """The number of directions; where the sum has them all, no other matrix is looked at."""
    if over == "full" or int(namespace(total.S).count_nonzero(total.present)) == min(shape):
        return min(shape)
    return dimension([spectrum(matrices[i, :, :]) for i in range(matrices.shape[0])], shape, over)
