"""TIES or DARE-TIES in the left singular vectors that all task vectors share (KnOTS)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from annotated_types import Interval

from mergebench.compute.agreement import Divisor, agreed, elected, real
from mergebench.compute.masking import silence
from mergebench.compute.matrices import Kernels, as_matrices, as_stack, is_matrix, mean_rows
from mergebench.compute.namespace import namespace
from mergebench.compute.random import chosen, stream_of
from mergebench.compute.spectra import TOLERANCE, spectrum, svd_bytes
from mergebench.core.params import Seed
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op

Prune = Literal["magnitude", "random"]


def _workspace(models: int, rows: int, columns: int) -> int:
    return svd_bytes(rows, models * columns) + 40 * models * rows * columns


@op(
    granularity="tensor",
    reduces=True,
    equivariant="left",
    workspace=_workspace,
    tolerance=TOLERANCE,
)
def knots(
    stack: Stack,
    at: At,
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2,
    divisor: Divisor = "count",
    kernels: Kernels = "vector",
    prune: Prune = "magnitude",
    seed: Seed = 0,
) -> Stack:
    """``U · TIES(Uᵀ τ_1, …, Uᵀ τ_N)`` with U the left singular vectors of ``[τ_1 … τ_N]``.

    Parameters
    ----------
    density : float in (0, 1]
        Share of the coordinates Uᵀ τ_i, over the singular values that are not zero, that stays.
    divisor : count or none
        Divide by the number of agreeing task vectors, or add up.
    kernels : vector or matrix
        Whether kernels of convolutions are averaged as vectors are, or taken as matrices.
    prune : magnitude or random
        Keep the largest coordinates; or each with probability ``density``, divided by it.
    seed : int
        Of ``random``: what is drawn depends on it, on the weight's name, on what the model holds
        and on the place of the coordinate, singular vectors in falling order of their values.
    """
    if not is_matrix(at.site, kernels):
        return mean_rows(stack * _shares(stack, at))
    if stack.shape[0] == 1 and density >= 1:
        return stack * _shares(stack, at)
    xp = namespace(stack)
    matrices = as_matrices(stack, at.site, at.core)
    count, columns = matrices.shape[0], matrices.shape[2]
    found = spectrum(xp.concat([matrices[model, :, :] for model in range(count)], axis=1))
    basis = found.U[:, : int(xp.count_nonzero(found.present))]
    coordinates = xp.reshape(xp.matrix_transpose(basis) @ matrices, (count, -1))
    if prune == "random":
        combined = elected(_drawn(coordinates, at, density, seed), at.weights, divisor)
    else:
        combined = agreed(coordinates, at.weights, density, divisor)
    merged = xp.reshape(combined, (-1, columns))
    return as_stack((basis @ merged)[None, :, :], at.site, stack)


def _drawn(coordinates: Stack, at: At, density: float, seed: int) -> Stack:
    size = coordinates.shape[1]
    masks = [chosen(stream_of(seed, at.site.key, key), 0, size, density) for key in at.keys]
    mask = namespace(coordinates).asarray(np.stack(masks), device=coordinates.device)
    return silence(real(coordinates), mask) / density


def _shares(stack: Stack, at: At) -> Stack:
    xp = namespace(stack)
    return xp.asarray(at.weights, dtype=stack.dtype, device=stack.device)[:, None]
