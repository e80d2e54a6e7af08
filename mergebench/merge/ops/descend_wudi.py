"""Undo the interference that every task vector would feel on the inputs it responds to (WUDI)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from mergebench.compute.matrices import Kernels, as_matrices, as_stack, is_matrix, mean_rows
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE, spectrum, svd_bytes
from mergebench.merge.at import At, Stack
from mergebench.merge.op import Sides, op

Solver = Literal["steps", "exact"]
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


def _sides(solver: Solver, **_: object) -> Sides:
    # Adam normalises entry by entry, so its path depends on the basis; its end would not.
    return "both" if solver == "exact" else "none"


def _workspace(models: int, rows: int, columns: int) -> int:
    gram = 8 * 3 * columns * columns
    return svd_bytes(models * rows, columns) + 8 * (2 * models + 8) * rows * columns + gram


@op(
    granularity="tensor",
    reduces=True,
    equivariant=_sides,
    workspace=_workspace,
    tolerance=TOLERANCE,
    equal_norms=True,
)
def descend_wudi(
    stack: Stack,
    at: At,
    solver: Solver = "steps",
    steps: Annotated[int, Ge(1)] = 300,
    rate: Annotated[float, Gt(0)] = 1e-5,
    kernels: Kernels = "vector",
) -> Stack:
    """Minimise ``Σ_i ‖(τ - τ_i) τ_iᵀ‖² / ‖τ_i‖²`` over τ, starting from the sum.

    Parameters
    ----------
    solver : steps or exact
        Some steps of Adam, or the minimum that is nearest to the sum.
    steps : int >= 1
        How many steps.
    rate : float > 0
        The learning rate, about how far an entry moves in one step.
    kernels : vector or matrix
        Whether kernels of convolutions are averaged as vectors are, or taken as matrices.
    """
    if not is_matrix(at.site, kernels):
        return mean_rows(stack)
    if stack.shape[0] == 1:
        return stack
    xp = namespace(stack)
    matrices = as_matrices(stack, at.site, at.core)
    norms = xp.linalg.vector_norm(matrices, axis=(1, 2), keepdims=True)
    # A task vector of zero asks for nothing.
    unit = matrices / (norms + xp.astype(norms == 0, norms.dtype))
    total = xp.sum(matrices, axis=0)
    merged = (
        _exact(total, matrices, unit)
        if solver == "exact"
        else _descended(total, matrices, unit, steps, rate)
    )
    return as_stack(merged[None, :, :], at.site, stack)


def _exact(total: Any, matrices: Any, unit: Any) -> Any:
    """``T + (R - T S) S⁺`` with ``S = Σ G_i``, ``R = Σ τ_i G_i``, ``G_i = τ_iᵀ τ_i / ‖τ_i‖²``."""
    xp = namespace(total)
    found = spectrum(xp.reshape(unit, (-1, unit.shape[2])))
    # In coordinates of the row space, whose squares are the eigenvalues of S.
    right = xp.matrix_transpose(found.Vt)
    inside = sum(
        (matrices[i, :, :] - total) @ xp.matrix_transpose(unit[i, :, :]) @ (unit[i, :, :] @ right)
        for i in range(unit.shape[0])
    )
    safe = found.S + xp.astype(~found.present, found.S.dtype)
    divided = inside * (xp.astype(found.present, safe.dtype) / safe**2)[None, :]
    return total + divided @ found.Vt


def _descended(total: Any, matrices: Any, unit: Any, steps: int, rate: float) -> Any:
    """Adam on the loss, whose gradient is ``2 (τ S - R)``."""
    xp = namespace(total)
    grams = xp.matrix_transpose(unit) @ unit
    gram, target = xp.sum(grams, axis=0), xp.sum(matrices @ grams, axis=0)
    merged, first, second = total, xp.zeros_like(total), xp.zeros_like(total)
    for step in range(1, steps + 1):
        slope = 2 * (merged @ gram - target)
        first = _BETA1 * first + (1 - _BETA1) * slope
        second = _BETA2 * second + (1 - _BETA2) * slope * slope
        size = xp.sqrt(second / (1 - _BETA2**step)) + _EPSILON
        merged = merged - rate / (1 - _BETA1**step) * first / size
    return merged
