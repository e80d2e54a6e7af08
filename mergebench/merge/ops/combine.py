"""Combine matrices one way and everything else by the mean."""

from __future__ import annotations

from typing import Literal

from mergebench.compute.matrices import Kernels, is_matrix, mean_rows, sum_rows
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


@op(linear=True, reduces=True)
def combine(
    stack: Stack, at: At, matrices: Literal["sum", "mean"] = "sum", kernels: Kernels = "vector"
) -> Stack:
    """``Σ_i x_i`` for matrices and ``Σ_i x_i / N`` for vectors, as spectral methods combine them.

    Parameters
    ----------
    matrices : sum or mean
        Whether matrices are divided by the number of models too.
    kernels : vector or matrix
        What kernels of convolutions count as.
    """
    summed = matrices == "sum" and is_matrix(at.site, kernels)
    return sum_rows(stack) if summed else mean_rows(stack)
