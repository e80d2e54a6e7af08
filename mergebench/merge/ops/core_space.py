"""TIES in bases of the column and row spaces that all task vectors share (Core Space)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Interval

from mergebench.compute.agreement import Divisor, agreed
from mergebench.compute.matrices import Kernels, as_matrices, as_stack, is_matrix, mean_rows
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE, Spectrum, spectrum, svd_bytes
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


def _workspace(models: int, rows: int, columns: int) -> int:
    least = min(rows, columns)
    thin = 8 * (rows + columns) * least
    joint = max(svd_bytes(rows, models * least), svd_bytes(columns, models * least))
    return 8 * models * rows * columns + 2 * models * thin + joint + 40 * models * rows * columns


@op(
    granularity="tensor",
    reduces=True,
    equivariant="both",
    workspace=_workspace,
    tolerance=TOLERANCE,
)
def core_space(
    stack: Stack,
    at: At,
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2,
    divisor: Divisor = "count",
    kernels: Kernels = "vector",
) -> Stack:
    """``U · TIES(Uᵀ τ_1 V, …) · Vᵀ`` with U, V the singular vectors of all U_i√S_i and V_i√S_i.

    Parameters
    ----------
    density : float in (0, 1]
        Share of the coordinates Uᵀ τ_i V that stays.
    divisor : count or none
        Divide by the number of agreeing task vectors, or add up.
    kernels : vector or matrix
        Whether kernels of convolutions are averaged as vectors are, or taken as matrices.
    """
    xp = namespace(stack)
    shares = xp.asarray(at.weights, dtype=stack.dtype, device=stack.device)[:, None]
    if not is_matrix(at.site, kernels):
        return mean_rows(stack * shares)
    if stack.shape[0] == 1 and density >= 1:
        return stack * shares
    matrices = as_matrices(stack, at.site, at.core)
    count = matrices.shape[0]
    parts = [spectrum(matrices[model, :, :]) for model in range(count)]
    left, right = _basis(parts, "U"), _basis(parts, "Vt")
    inside = xp.matrix_transpose(left) @ matrices @ right
    coordinates = xp.reshape(inside, (count, -1))
    merged = xp.reshape(agreed(coordinates, at.weights, density, divisor), inside.shape[1:])
    return as_stack((left @ merged @ xp.matrix_transpose(right))[None, :, :], at.site, stack)


def _basis(parts: Sequence[Spectrum], side: str) -> Any:
    """Orthonormal columns, leading ones first, that span the columns or rows of all matrices."""
    xp = namespace(parts[0].U)
    largest = xp.max(xp.concat([part.S for part in parts]))
    # Relative to the largest, so that scaling all task vectors scales nothing but the result.
    largest = largest + xp.astype(largest == 0, largest.dtype)
    blocks = []
    for part in parts:
        size = int(xp.count_nonzero(part.present))
        vectors = part.U if side == "U" else xp.matrix_transpose(part.Vt)
        blocks.append(vectors[:, :size] * xp.sqrt(part.S[:size] / largest)[None, :])
    whole = xp.concat(blocks, axis=1)
    if whole.shape[1] == 0:
        return whole
    found = spectrum(whole)
    return found.U[:, : int(xp.count_nonzero(found.present))]
