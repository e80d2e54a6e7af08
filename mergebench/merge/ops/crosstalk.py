"""Look at how task vectors respond to each other's inputs, and change nothing."""

from __future__ import annotations

from math import acos, degrees

from mergebench.compute import crosstalk as between
from mergebench.compute.matrices import Kernels, as_matrices, is_matrix
from mergebench.compute.spectra import svd_bytes
from mergebench.merge.at import At, Reading, Stack
from mergebench.merge.op import op


def _report(
    before: Stack, after: Stack, at: At, kernels: Kernels = "matrix"
) -> tuple[Reading, ...]:
    if not is_matrix(at.site, kernels):
        return ()
    matrices = as_matrices(before, at.site, at.core)
    each = [matrices[model, :, :] for model in range(matrices.shape[0])]
    bases = [between.row_basis(matrix) for matrix in each]
    found = []
    for one, other in between.pairs(len(each)):
        ranks = bases[one].shape[1], bases[other].shape[1]
        cosines = between.principal_cosines(bases[one], bases[other])
        # Without a direction there is no angle: nothing is nearer than orthogonal.
        nearest = degrees(acos(float(cosines[0]))) if cosines.shape[0] else 90.0
        numbers = {
            "crosstalk": between.crosstalk(each[one], each[other]),
            "overlap of row spaces": between.overlap(cosines, ranks),
            "smallest angle": nearest,
            "cosine": between.cosine(each[one], each[other]),
        }
        found += [Reading(what, (one, other), value) for what, value in numbers.items()]
    return tuple(found)


def _workspace(models: int, rows: int, columns: int) -> int:
    least = min(rows, columns)
    held = 8 * models * (rows * columns + columns * least)
    return (
        held
        + svd_bytes(rows, columns)
        + between.crosstalk_bytes(rows, columns)
        + svd_bytes(least, least)
    )


@op(granularity="tensor", equivariant="both", workspace=_workspace, report=_report)
def crosstalk(stack: Stack, at: At, kernels: Kernels = "matrix") -> Stack:
    """Report, per pair and weight, how far task vectors answer each other's inputs.

    Crosstalk is ``‖τ_i τ_jᵀ‖ / (‖τ_i‖ ‖τ_j‖)``, the overlap of row spaces ``‖Q_iᵀ Q_j‖ / √min(r_i,
    r_j)`` with orthonormal bases Q of them, the smallest angle that between their two nearest
    directions in degrees, the cosine that of the task vectors as vectors. For two orthogonal row
    spaces these are 0, 0, 90 and 0. What is zero is orthogonal to everything.

    Parameters
    ----------
    kernels : vector or matrix
        Whether kernels of convolutions are left out, or taken as out × (in · ∏ kernel).
    """
    return stack
