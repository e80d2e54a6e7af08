"""Compress: every task's own leading singular triplets."""

from __future__ import annotations

from math import isfinite
from typing import Annotated

from mergebench.compute.matrices import Kernels, as_matrices, as_stack, is_matrix, matrix_shape
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE, spectrum, svd_bytes
from mergebench.core.errors import ParameterError
from mergebench.core.params import Examples
from mergebench.core.site import Site
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op

#: The word for ``share`` that stands for one over the number of tasks.
TASKS = "tasks"


def parse_share(share: str) -> float | None:
    """A share in [0, 1]; ``None`` where the number of tasks decides it.

    Raises
    ------
    ParameterError
        If it is neither such a number nor the word.
    """
    if share == TASKS:
        return None
    try:
        number = float(share)
    except ValueError:
        number = float("nan")
    if not isfinite(number) or not 0 <= number <= 1:
        raise ParameterError(
            "compress: `share` must be a number from 0 to 1, or tasks",
            got=share,
            fix="give share=tasks for one over the number of models",
        )
    return number


def kept(shape: tuple[int, ...], models: int, share: float | None) -> int:
    """How many singular values of a tensor stay, at least one."""
    least = min(matrix_shape(shape))
    return max(least // models if share is None else int(share * least), 1)


def truncated(matrices: Stack, rank: int) -> Stack:
    """The nearest matrices of a rank, (n, rows, columns), float64."""
    found = []
    for model in range(matrices.shape[0]):
        # One after the other: the vectors of a decomposition are as large as two matrices.
        part = spectrum(matrices[model, :, :]).leading(rank)
        found.append(part.product(part.S))
    return namespace(matrices).stack(found)


def workspace(models: int, rows: int, columns: int) -> int:
    """Memory of :func:`truncated`, and of matrices in float64 before and after it."""
    return svd_bytes(rows, columns) + 32 * models * rows * columns


def _check(site: Site, share: str, kernels: Kernels) -> None:
    parse_share(share)


def _rank(shape: tuple[int, ...], models: int, share: str, kernels: Kernels) -> int | None:
    matrix = len(shape) == 2 or (len(shape) > 2 and kernels == "matrix")
    return kept(shape, models, parse_share(share)) if matrix and 0 not in shape else None


@op(
    granularity="tensor",
    equivariant="both",
    workspace=workspace,
    tolerance=TOLERANCE,
    check=_check,
    rank=_rank,
    apart="each",
)
def compress(
    stack: Stack,
    at: At,
    share: Annotated[str, Examples((TASKS, "0.1", "1"))] = TASKS,
    kernels: Kernels = "vector",
) -> Stack:
    """Every task vector at a low rank of its own; the models are not combined.

    Parameters
    ----------
    share : tasks or a number from 0 to 1, default tasks
        Of the r singular values of a matrix, r its smaller side, ⌊r / N⌋ stay for N tasks, or
        ⌊share · r⌋; at least one.
    kernels : vector or matrix
        Whether kernels of convolutions are left as they are, as vectors are, or taken as
        matrices.
    """
    if not is_matrix(at.site, kernels):
        return stack
    matrices = as_matrices(stack, at.site, at.core)
    rank = kept(at.site.shape, stack.shape[0], parse_share(share))
    if rank >= min(matrices.shape[1:]):
        return stack
    return as_stack(truncated(matrices, rank), at.site, stack)
