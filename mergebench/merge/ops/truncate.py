"""Truncate: keep the largest singular values of a matrix."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from mergebench.compute.matrices import Kernels, as_matrices, as_stack, is_matrix
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE, spectrum, svd_bytes
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


def _workspace(models: int, rows: int, columns: int) -> int:
    return svd_bytes(rows, columns) + 16 * models * rows * columns


def _rank(shape: tuple[int, ...], models: int, rank: int, kernels: Kernels) -> int | None:
    # Kernels that count as vectors keep their rank.
    return rank if len(shape) == 2 or kernels == "matrix" else None


@op(
    granularity="tensor",
    equivariant="both",
    workspace=_workspace,
    tolerance=TOLERANCE,
    rank=_rank,
    checked={"PEFT 0.21": "1e-05"},
)
def truncate(
    stack: Stack, at: At, rank: Annotated[int, Ge(0)], kernels: Kernels = "matrix"
) -> Stack:
    """The nearest matrix of a rank (Eckart-Young); other tensors are left as they are.

    Parameters
    ----------
    rank : int >= 0
        How many singular values stay. Matrices whose smaller side is no larger are left alone.
    kernels : vector or matrix
        Whether kernels of convolutions are left alone, or taken as out × (in · ∏ kernel).
    """
    if not is_matrix(at.site, kernels):
        return stack
    xp = namespace(stack)
    matrices = as_matrices(stack, at.site, at.core)
    if rank >= min(matrices.shape[1:]):
        return stack
    kept = []
    for model in range(matrices.shape[0]):
        part = spectrum(matrices[model, :, :]).leading(rank)
        kept.append(part.product(part.S))
    return as_stack(xp.stack(kept), at.site, stack)
