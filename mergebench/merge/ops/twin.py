"""Twin: a shared task vector, and beside it what each task has alone, at a low rank."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from mergebench.compute.matrices import Kernels, as_matrices, as_stack, is_matrix, sum_rows
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op
from mergebench.merge.ops.compress import kept, truncated, workspace


@op(
    granularity="tensor",
    equivariant="both",
    workspace=workspace,
    tolerance=TOLERANCE,
    apart="each",
)
def twin(
    stack: Stack,
    at: At,
    density: Annotated[float, Interval(ge=0, le=1)] = 0.1,
    lam: float = 0.3,
    kernels: Kernels = "vector",
) -> Stack:
    """``τ* + SVD_k(τ_i - τ*)`` for every task, with the shared ``τ* = lam · Σ τ_i``.

    Parameters
    ----------
    density : float in [0, 1], default 0.1
        k = ⌊density · r⌋ of the r singular values of a matrix, r its smaller side, at least one;
        0 leaves the shared part alone, 1 gives every task vector back.
    lam : float, default 0.3
        Weight of the sum in the shared part.
    kernels : vector or matrix
        Whether kernels of convolutions are kept whole, as vectors are, or taken as matrices.
    """
    if density == 0:
        return namespace(stack).zeros_like(stack) + sum_rows(stack) * lam
    if not is_matrix(at.site, kernels):
        return stack
    matrices = as_matrices(stack, at.site, at.core)
    rank = kept(at.site.shape, stack.shape[0], density)
    if rank >= min(matrices.shape[1:]):
        return stack
    shared = lam * namespace(matrices).sum(matrices, axis=0)
    return as_stack(shared + truncated(matrices - shared, rank), at.site, stack)
