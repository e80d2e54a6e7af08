"""Orthogonal adaptation written out with torch in float64, matrix by matrix.

Nothing here imports the package. Projectors come from eigenvectors of Gram matrices and from
pseudo-inverses, where the package takes singular vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Matrix = torch.Tensor
#: What is left of a matrix below this share of it is rounding.
ZERO = 2.0**-20


def row_projector(tau: Matrix, energy: float = 1.0, scale: float | None = None) -> Matrix:
    """Onto the fewest leading eigenvectors of τᵀτ that hold a share of its trace."""
    values, vectors = torch.linalg.eigh(tau.T @ tau)
    values, vectors = values.flip(0), vectors.flip(1)
    largest = float(values[0]) if scale is None else scale * scale
    count = sum(float(value) > max(largest * 1e-11, 0.0) for value in values)
    taken = 0
    while taken < count and float(values[:taken].sum()) < (energy - 1e-12) * float(
        values[:count].sum()
    ):
        taken += 1
    if energy >= 1:
        taken = count
    chosen = vectors[:, :taken]
    return chosen @ chosen.T


def sequential(taus: Sequence[Matrix], energy: float = 1.0) -> list[Matrix]:
    """τ_i (I - P) with P onto what the matrices before it claim, one after the other."""
    taken = torch.zeros((taus[0].shape[1],) * 2, dtype=taus[0].dtype)
    made = []
    for tau in taus:
        apart = tau - tau @ taken
        if apart.norm() <= ZERO * tau.norm():
            apart = torch.zeros_like(tau)
        made.append(apart)
        taken = taken + row_projector(apart, energy, float(tau.norm()))
    return made


def joint(taus: Sequence[Matrix], energy: float = 1.0) -> list[Matrix]:
    """τ_i G^(-1/2) P_i G^(-1/2) with G the sum of all row projectors P_i."""
    projectors = [row_projector(tau, energy) for tau in taus]
    values, vectors = torch.linalg.eigh(sum(projectors, torch.zeros_like(projectors[0])))
    kept = values > 1e-10
    root = (vectors[:, kept] / values[kept].sqrt()) @ vectors[:, kept].T
    return [tau @ root @ own @ root for tau, own in zip(taus, projectors, strict=True)]


def crosstalk(one: Matrix, other: Matrix) -> float:
    """‖X Yᵀ‖ / (‖X‖ ‖Y‖), entry by entry; 0 if one is zero."""
    total = sum(float(row @ column) ** 2 for row in one for column in other)
    lengths = float(one.norm() * other.norm())
    return math.sqrt(total) / lengths if lengths else 0.0


def overlap(one: Matrix, other: Matrix) -> float:
    """√(tr(P_i P_j) / min(r_i, r_j)) of the projectors onto two row spaces."""
    first, second = row_projector(one), row_projector(other)
    least = min(round(float(first.trace())), round(float(second.trace())))
    return math.sqrt(max(float((first * second).sum()), 0.0) / least) if least else 0.0


def smallest_angle(one: Matrix, other: Matrix) -> float:
    """In degrees, from the largest eigenvalue of P_i P_j P_i; 90 if one row space is empty."""
    first, second = row_projector(one), row_projector(other)
    largest = float(torch.linalg.eigvalsh(first @ second @ first)[-1])
    return math.degrees(math.acos(math.sqrt(min(max(largest, 0.0), 1.0))))
