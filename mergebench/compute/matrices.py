"""Stacks as matrices: out × in, in float64."""

from __future__ import annotations

from math import prod
from typing import Any, Literal

from mergebench.compute.masking import silence
from mergebench.compute.namespace import namespace
from mergebench.core.errors import MismatchError
from mergebench.core.site import Site

#: Whether the kernel of a convolution counts as the matrix out × (in · ∏ kernel), or like a vector.
Kernels = Literal["vector", "matrix"]
_NOTHING = 2.0**-60


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(rows, columns)`` of a tensor flattened behind its first dimension."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def is_matrix(site: Site, kernels: Kernels) -> bool:
    """Whether spectral ops see a matrix: two dimensions, or a kernel taken as one; not empty."""
    enough = len(site.shape) == 2 or (len(site.shape) > 2 and kernels == "matrix")
    return enough and site.size > 0


def as_matrices(stack: Any, site: Site, core: tuple[int, int] | None = None) -> Any:
    """The entries of a whole tensor as matrices out × in.

    Parameters
    ----------
    stack : array, (n, m)
        All entries of ``site`` for n models.
    site : Site
        A transposed one (GPT-2's ``Conv1D``) is stored input × output.
    core : (int, int), optional
        Shape of the stored matrices where they are given in other bases.

    Returns
    -------
    float64 array, (n, out, in)

    Raises
    ------
    MismatchError
        For numbers of 16 bits, which decompositions do not take.
    """
    xp = namespace(stack)
    if stack.dtype.itemsize < 4:
        raise MismatchError(
            f"{site.name}: decompositions need 32 bits or more",
            got=str(stack.dtype),
            fix="convert the task vectors to float32",
        )
    rows, columns = core or matrix_shape(site.shape)
    wide = xp.astype(xp.reshape(stack, (-1, rows, columns)), xp.float64, copy=False)
    return xp.matrix_transpose(wide) if site.transposed else wide


def as_stack(matrices: Any, site: Site, like: Any) -> Any:
    """The stack, (n, m), of matrices out × in, in the dtype of ``like``.

    Entries below 2⁻⁶⁰ of the largest are what rounding makes of zeros, and become zeros.
    """
    xp = namespace(matrices)
    magnitudes = xp.abs(matrices)
    largest = xp.max(magnitudes, axis=(1, 2), keepdims=True)
    matrices = silence(matrices, magnitudes > _NOTHING * largest)
    stored = xp.matrix_transpose(matrices) if site.transposed else matrices
    return xp.astype(xp.reshape(stored, (matrices.shape[0], -1)), like.dtype, copy=False)


def sum_rows(stack: Any) -> Any:
    """The sum over models, (1, m), added up in their order."""
    total = stack[0:1, :]
    for model in range(1, stack.shape[0]):
        total = total + stack[model : model + 1, :]
    return total


def mean_rows(stack: Any) -> Any:
    """The mean over models, (1, m), added up in their order."""
    return sum_rows(stack) / stack.shape[0]
