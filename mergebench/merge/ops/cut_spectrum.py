"""Spectral truncation and rescale."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from mergebench.compute.matrices import Kernels, as_matrices, as_stack, is_matrix
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE, spectrum, svd_bytes
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


def _workspace(models: int, rows: int, columns: int) -> int:
    return svd_bytes(rows, columns) + 16 * models * rows * columns


@op(granularity="tensor", equivariant="both", workspace=_workspace, tolerance=TOLERANCE)
def cut_spectrum(
    stack: Stack,
    at: At,
    share: Annotated[float, Interval(gt=0, le=1)] = 0.4,
    kernels: Kernels = "vector",
) -> Stack:
    """Keep the fewest singular values that reach a share of their sum, and restore that sum.

    Parameters
    ----------
    share : float in (0, 1]
        Of the nuclear norm; 1 changes nothing.
    kernels : vector or matrix
        Whether kernels of convolutions are left as they are, or taken as out × (in · ∏ kernel).
    """
    if share >= 1 or not is_matrix(at.site, kernels):
        return stack
    xp = namespace(stack)
    matrices = as_matrices(stack, at.site, at.core)
    made = []
    for model in range(matrices.shape[0]):
        found = spectrum(matrices[model, :, :])
        reached = xp.cumulative_sum(found.S)
        total = reached[-1:]
        # A value stays while those before it have not reached the share.
        stays = xp.astype(reached - found.S < share * total, found.S.dtype)
        kept = xp.sum(found.S * stays)
        grown = total / (kept + xp.astype(kept == 0, kept.dtype))
        made.append(found.product(found.S * stays * grown))
    return as_stack(xp.stack(made), at.site, stack)
