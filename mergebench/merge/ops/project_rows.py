"""Project task vectors off each other's row spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Interval

from mergebench.compute import crosstalk as between
from mergebench.compute.matrices import Kernels, as_matrices, as_stack, is_matrix
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE, polar, svd_bytes
from mergebench.merge.at import At, Reading, Stack
from mergebench.merge.op import op

Variant = Literal["sequential", "joint"]


def _report(
    before: Stack,
    after: Stack,
    at: At,
    variant: Variant = "sequential",
    claim: float = 1.0,
    kernels: Kernels = "matrix",
) -> tuple[Reading, ...]:
    if not is_matrix(at.site, kernels):
        return ()
    old, new = (as_matrices(stack, at.site, at.core) for stack in (before, after))
    xp = namespace(old)
    found = []
    for model in range(old.shape[0]):
        length = xp.linalg.vector_norm(old[model, :, :])
        left = xp.linalg.vector_norm(new[model, :, :])
        # Nothing was lost of nothing.
        share = float(left / length) ** 2 if bool(length > 0) else 1.0
        found.append(Reading("retained energy", (model,), min(share, 1.0)))
    for one, other in between.pairs(old.shape[0]):
        for what, stack in (("crosstalk before", old), ("crosstalk after", new)):
            value = between.crosstalk(stack[one, :, :], stack[other, :, :])
            found.append(Reading(what, (one, other), value))
    return tuple(found)


def _workspace(models: int, rows: int, columns: int) -> int:
    least = min(rows, columns)
    joint = svd_bytes(columns, models * least) + 16 * columns * models * least
    held = 8 * models * (2 * rows * columns + columns * least)
    return held + max(svd_bytes(rows, columns), joint) + between.crosstalk_bytes(rows, columns)


@op(
    granularity="tensor",
    equivariant="both",
    workspace=_workspace,
    tolerance=TOLERANCE,
    ordered=lambda variant="sequential", **_: variant == "sequential",
    report=_report,
)
def project_rows(
    stack: Stack,
    at: At,
    variant: Variant = "sequential",
    claim: Annotated[float, Interval(gt=0, le=1)] = 1.0,
    kernels: Kernels = "matrix",
) -> Stack:
    """Project every task vector off the row spaces of the others: ``τ_i (I - P)``.

    Parameters
    ----------
    variant : sequential or joint
        sequential: the first model stays whole, each further one loses what lies in the row spaces
        of those before it, in the order in which the user names them. joint: orthonormal bases Q_i
        of all row spaces side by side are replaced by the nearest orthonormal columns Q̃_i, their
        polar factor, and τ_i becomes τ_i Q̃_i Q̃_iᵀ, whatever the order.
    claim : float in (0, 1]
        A row space is that of the fewest leading singular directions with this share of the squared
        singular values. In the joint variant a task vector loses the others.
    kernels : vector or matrix
        Whether kernels of convolutions are left as they are, or taken as out × (in · ∏ kernel).
    """
    if stack.shape[0] == 1 or not is_matrix(at.site, kernels):
        return stack
    xp = namespace(stack)
    matrices = as_matrices(stack, at.site, at.core)
    each = [matrices[model, :, :] for model in range(matrices.shape[0])]
    order = at.in_order(len(each))
    made = _jointly(each, claim) if variant == "joint" else _in_turn(each, order, claim)
    return as_stack(xp.stack(made), at.site, stack)


def _in_turn(each: Sequence[Any], order: Sequence[int], energy: float) -> list[Any]:
    """Every matrix without what lies in the row spaces of those before it."""
    xp = namespace(each[0])
    made = list(each)
    taken = xp.zeros((each[0].shape[1], 0), dtype=each[0].dtype)
    for place, model in enumerate(order):
        matrix = apart = each[model]
        if taken.shape[1]:
            apart = _off(matrix, taken)
            if between.is_negligible(apart, matrix):
                apart = xp.zeros_like(matrix)
            made[model] = apart
        if place < len(order) - 1:
            # What rounding leaves inside the row spaces before is no direction of its own.
            scale = xp.linalg.vector_norm(matrix)
            own = between.row_basis(apart, energy, scale if taken.shape[1] else None)
            taken = xp.concat([taken, own], axis=1)
    return made


def _off(matrix: Any, basis: Any) -> Any:
    # Twice, since the first time leaves rounding errors of the length of what is taken away.
    xp = namespace(matrix)
    for _ in range(2):
        matrix = matrix - (matrix @ basis) @ xp.matrix_transpose(basis)
    return matrix


def _jointly(each: Sequence[Any], energy: float) -> list[Any]:
    """``X_i Q̃_i Q̃_iᵀ`` with ``[Q̃_1 … Q̃_n]`` the polar factor of all bases side by side."""
    xp = namespace(each[0])
    bases = [between.row_basis(matrix, energy) for matrix in each]
    ends = [0]
    for basis in bases:
        ends.append(ends[-1] + basis.shape[1])
    if ends[-1] == 0:
        return list(each)
    near = polar(xp.concat(bases, axis=1))
    made = []
    for model, matrix in enumerate(each):
        own = near[:, ends[model] : ends[model + 1]]
        found = (matrix @ own) @ xp.matrix_transpose(own)
        lost = between.is_negligible(found, matrix)
        made.append(xp.zeros_like(matrix) if lost else found)
    return made
