"""Singular value calibration of a merged task vector."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from mergebench.compute.matrices import Kernels, as_matrices, as_stack, is_matrix
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import RANK, TOLERANCE, spectrum, svd_bytes
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


def _workspace(models: int, rows: int, columns: int) -> int:
    least = min(rows, columns)
    return svd_bytes(rows, columns) + 8 * ((models + 2) * rows * columns + 4 * least * columns)


@op(
    granularity="tensor",
    needs_models=True,
    equivariant="both",
    workspace=_workspace,
    tolerance=TOLERANCE,
    of_updates=True,
    checked={"FusionBench 0.2.33": "1e-04"},
)
def svc(
    stack: Stack,
    at: At,
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.0,
    kernels: Kernels = "vector",
) -> Stack:
    """Shrink singular values that several task vectors share and have piled up (SVC).

    For the merged ΔW = U diag(σ) Vᵀ and the task vectors ΔW_i before any op (and without their
    weights): a_r = u_rᵀ ΔW, b_ir = u_rᵀ ΔW_i, s_ir = ⟨a_r, b_ir⟩ / ‖b_ir‖², and σ_r becomes
    σ_r · N / Σ_i max(α, s_ir). Task vectors that have nothing along u_r do not count there.
    After arXiv:2602.05536. Tensors that are no matrices are left as they are.

    Parameters
    ----------
    alpha : float in [0, 1]
        The least projection that counts; 0 stands for 1 / N, the paper's. With 1, singular values
        never grow.
    kernels : vector or matrix
        Whether kernels of convolutions are left as they are, or taken as out × (in · ∏ kernel).
    """
    if not is_matrix(at.site, kernels):
        return stack
    xp = namespace(stack)
    tasks = as_matrices(at.models, at.site, at.core)
    matrices = as_matrices(stack, at.site, at.core)
    floor = alpha or 1 / tasks.shape[0]
    made = []
    for model in range(matrices.shape[0]):
        found = spectrum(matrices[model, :, :])
        merged = found.S[:, None] * found.Vt
        count, total = xp.zeros_like(found.S), xp.zeros_like(found.S)
        for task in range(tasks.shape[0]):
            response = xp.matrix_transpose(found.U) @ tasks[task, :, :]
            size = xp.linalg.vector_norm(response, axis=1)
            present = xp.astype(size > RANK * xp.linalg.vector_norm(tasks[task, :, :]), size.dtype)
            safe = size + (1 - present)
            along = xp.sum(merged / safe[:, None] * (response / safe[:, None]), axis=1)
            count = count + present
            total = total + present * xp.clip(along, min=floor)
        gamma = count / (total + xp.astype(count == 0, total.dtype))
        gamma = gamma + xp.astype(count == 0, total.dtype)
        made.append(found.product(found.S * gamma))
    return as_stack(xp.stack(made), at.site, stack)
