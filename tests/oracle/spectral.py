"""Spectral merge methods written out with torch in float64, matrix by matrix.

Nothing here imports the package. A list of task vectors of one matrix goes in, all of shape
out × in, and the merged one comes out. Polar factors and shared bases are computed another way
than in the package: from eigenvectors of Gram matrices instead of singular vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Matrix = torch.Tensor
#: Singular values below this share of the largest are zero.
ZERO = 2.0**-20


def svd(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Thin singular value decomposition, singular values that are zero left out."""
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    count = int((S.max() * ZERO < S).sum()) if S.max() > 0 else 0
    return U[:, :count], S[:count], Vt[:count]


def rank(matrix: Matrix) -> int:
    """Number of singular values that are not zero."""
    return len(svd(matrix)[1])


def inverse_root(gram: Matrix) -> Matrix:
    """The symmetric inverse square root of a positive semidefinite matrix, on its own range."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values.max() * 1e-11
    return (vectors[:, kept] / values[kept].sqrt()) @ vectors[:, kept].T


def orthonormal(columns: Matrix) -> Matrix:
    """The nearest matrix with orthonormal columns: ``X (XᵀX)^(-1/2)``."""
    return columns @ inverse_root(columns.T @ columns)


def dimension(taus: Sequence[Matrix], over: str) -> int:
    """Directions there are: all, or those that the task vectors span together."""
    full = min(taus[0].shape)
    return full if over == "full" else min(rank(torch.cat(list(taus), d)) for d in (0, 1))


def tsv_merge(
    taus: Sequence[Matrix], keep: str = "share", orthogonalize: bool = True, over: str = "rank"
) -> Matrix:
    """Sum of u s vᵀ over every task's leading triplets, u and v made orthonormal."""
    if len(taus) == 1:
        return taus[0]
    each = max(dimension(taus, over) // len(taus), 1) if keep == "share" else None
    found = [svd(tau) for tau in taus]
    U = torch.cat([U[:, :each] for U, _, _ in found], 1)
    S = torch.cat([S[:each] for _, S, _ in found])
    V = torch.cat([Vt[:each].T for _, _, Vt in found], 1)
    if orthogonalize:
        U, V = orthonormal(U), orthonormal(V)
    return sum(
        (S[r] * torch.outer(U[:, r], V[:, r]) for r in range(len(S))), torch.zeros_like(taus[0])
    )


def iso_c(taus: Sequence[Matrix], over: str = "rank") -> Matrix:
    """The sum with all singular values at their mean: σ̄ Δ (ΔᵀΔ)^(-1/2)."""
    total = sum(taus, torch.zeros_like(taus[0]))
    norm = torch.linalg.matrix_norm(total, "nuc")
    count = rank(total) if over == "rank" else min(total.shape)
    return norm / max(count, 1) * orthonormal(total)


def iso_cts(taus: Sequence[Matrix], common: float = 0.8, over: str = "rank") -> Matrix:
    """Isotropic merge of the sum's leading directions and the tasks' directions off them."""
    total = sum(taus, torch.zeros_like(taus[0]))
    size = dimension(taus, over)
    wanted = int(common * size)
    apart = min(round((size - wanted) / len(taus)), size // len(taus))
    leading = size - apart * len(taus)
    U, S, Vt = svd(total)
    U, S, Vt = U[:, :leading], S[:leading], Vt[:leading]
    lefts, values, rights = [U], [S], [Vt.T]
    for tau in taus:
        residual = tau - U @ U.T @ tau
        if residual.norm() <= ZERO * tau.norm():
            continue
        own, s, vt = svd(residual)
        count = min(apart, int((s > ZERO * tau.norm()).sum()))
        lefts.append(own[:, :count])
        values.append(s[:count])
        rights.append(vt[:count].T)
    S = torch.cat(values)
    mean = S.sum() / max(len(S) if over == "rank" else size, 1)
    if not len(S):
        return torch.zeros_like(total)
    return mean * orthonormal(torch.cat(lefts, 1)) @ orthonormal(torch.cat(rights, 1)).T


def cart(
    taus: Sequence[Matrix], lam: float = 1.0, share: float = 0.08, over: str = "rank"
) -> Matrix:
    """The mean plus the leading triplets of every difference to it."""
    mean = sum(taus, torch.zeros_like(taus[0])) / len(taus)
    apart = [tau - mean for tau in taus]
    largest = max(float(tau.norm()) for tau in taus)
    if max(float(each.norm()) for each in apart) <= ZERO * largest:
        return mean
    each = max(int(share * dimension(apart, over)), 1)
    merged = mean.clone()
    for difference in apart:
        U, S, Vt = svd(difference)
        merged += lam * (U[:, :each] * S[:each]) @ Vt[:each]
    return merged


def star(tau: Matrix, share: float = 0.4) -> Matrix:
    """The fewest triplets that reach a share of the nuclear norm, scaled up to that norm."""
    U, S, Vt = torch.linalg.svd(tau, full_matrices=False)
    norm, count = float(S.sum()), 0
    while count < len(S) and float(S[:count].sum()) < share * norm:
        count += 1
    if count == 0:
        return torch.zeros_like(tau)
    return norm / float(S[:count].sum()) * (U[:, :count] * S[:count]) @ Vt[:count]


def svc(merged: Matrix, taus: Sequence[Matrix], alpha: float = 0.0) -> Matrix:
    """Singular values divided by the mean projection of the merged response on the tasks' own."""
    U, S, Vt = svd(merged)
    least = alpha or 1 / len(taus)
    result = torch.zeros_like(merged)
    for r in range(len(S)):
        response = U[:, r] @ merged
        terms = []
        for tau in taus:
            own = U[:, r] @ tau
            if own.norm() > ZERO * tau.norm():
                terms.append(max(least, float(response @ own / (own @ own))))
        gamma = len(terms) / sum(terms) if terms else 1.0
        result += gamma * S[r] * torch.outer(U[:, r], Vt[r])
    return result


def truncate(tau: Matrix, size: int) -> Matrix:
    """The leading singular triplets."""
    U, S, Vt = torch.linalg.svd(tau, full_matrices=False)
    return (U[:, :size] * S[:size]) @ Vt[:size]


def agreed(coordinates: Matrix, weights: Sequence[float], density: float, divisor: str) -> Matrix:
    """TIES on (models, entries), one entry after the other."""
    count, size = coordinates.shape
    kept = torch.zeros_like(coordinates)
    for i in range(count):
        largest = float(coordinates.abs().max()) or 1.0
        steps = [round(abs(float(each)) / (ZERO * largest)) for each in coordinates[i]]
        order = sorted(range(size), key=lambda j: (-steps[j], j))
        for j in order[: max(int(density * size), 1)]:
            if abs(float(coordinates[i, j])) > ZERO * float(coordinates.abs().max()):
                kept[i, j] = coordinates[i, j]
    merged = torch.zeros(size, dtype=coordinates.dtype)
    for j in range(size):
        sign = torch.sign(kept[:, j].sum())
        own = [i for i in range(count) if kept[i, j] != 0 and torch.sign(kept[i, j]) == sign]
        total = sum(weights[i] * float(kept[i, j]) for i in own)
        merged[j] = total / len(own) if own and divisor == "count" else total
    return merged


def leading_vectors(gram: Matrix) -> Matrix:
    """Eigenvectors of a positive semidefinite matrix, of the largest eigenvalue first."""
    values, vectors = torch.linalg.eigh(gram)
    order = torch.argsort(values, descending=True)
    return vectors[:, order[values[order] > values.max() * 1e-11]]


def knots_ties(
    taus: Sequence[Matrix], weights: Sequence[float], density: float = 0.2, divisor: str = "count"
) -> Matrix:
    """TIES on coordinates in the eigenvectors of Σ τ τᵀ."""
    basis = leading_vectors(sum((tau @ tau.T for tau in taus), torch.zeros(())))
    coordinates = torch.stack([(basis.T @ tau).reshape(-1) for tau in taus])
    merged = agreed(coordinates, weights, density, divisor)
    return basis @ merged.reshape(basis.shape[1], -1)


def core_ties(
    taus: Sequence[Matrix], weights: Sequence[float], density: float = 0.2, divisor: str = "count"
) -> Matrix:
    """TIES on coordinates in the eigenvectors of Σ U S Uᵀ and of Σ V S Vᵀ."""
    found = [svd(tau) for tau in taus]
    left = leading_vectors(sum((U * S @ U.T for U, S, _ in found), torch.zeros(())))
    right = leading_vectors(sum((Vt.T * S @ Vt for _, S, Vt in found), torch.zeros(())))
    coordinates = torch.stack([(left.T @ tau @ right).reshape(-1) for tau in taus])
    merged = agreed(coordinates, weights, density, divisor)
    return left @ merged.reshape(left.shape[1], -1) @ right.T


def wudi_loss(tau: Matrix, taus: Sequence[Matrix]) -> Matrix:
    """Σ ‖(τ - τ_i) τ_iᵀ‖² / ‖τ_i‖², without task vectors of zero."""
    terms = [((tau - own) @ own.T).square().sum() / own.square().sum() for own in taus if own.any()]
    return sum(terms, torch.zeros((), dtype=tau.dtype))


def wudi_steps(taus: Sequence[Matrix], steps: int, rate: float) -> Matrix:
    """Torch's Adam on the loss, from the sum."""
    merged = sum(taus, torch.zeros_like(taus[0])).clone().requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps if any(bool(tau.any()) for tau in taus) else 0):
        optimizer.zero_grad()
        wudi_loss(merged, taus).backward()
        optimizer.step()
    return merged.detach()


def wudi_exact(taus: Sequence[Matrix]) -> Matrix:
    """T + (R - T S) S⁺ through torch's pseudo-inverse."""
    total = sum(taus, torch.zeros_like(taus[0]))
    grams = [tau.T @ tau / tau.square().sum() for tau in taus if tau.any()]
    if not grams:
        return total
    S = sum(grams, torch.zeros_like(grams[0]))
    R = sum(
        (tau @ g for tau, g in zip([t for t in taus if t.any()], grams, strict=True)),
        torch.zeros_like(total),
    )
    return total + (R - total @ S) @ torch.linalg.pinv(S, hermitian=True, rtol=1e-11)


def knots_dare_ties(
    taus: Sequence[Matrix],
    weights: Sequence[float],
    numbers: Sequence[Sequence[float]],
    density: float = 0.5,
    divisor: str = "count",
) -> Matrix:
    """DARE-TIES on coordinates in the eigenvectors of Σ τ τᵀ; number j decides on coordinate j."""
    basis = leading_vectors(sum((tau @ tau.T for tau in taus), torch.zeros(())))
    coordinates = torch.stack([(basis.T @ tau).reshape(-1) for tau in taus])
    least = ZERO * float(coordinates.abs().max())
    merged = torch.zeros(coordinates.shape[1], dtype=coordinates.dtype)
    for j in range(len(merged)):
        kept = [
            float(own[j]) / density if numbers[i][j] < density and abs(own[j]) > least else 0.0
            for i, own in enumerate(coordinates)
        ]
        sign = sum(kept)
        own = [i for i, value in enumerate(kept) if value * sign > 0]
        total = sum(weights[i] * kept[i] for i in own)
        merged[j] = total / len(own) if own and divisor == "count" else total
    return basis @ merged.reshape(basis.shape[1], -1)
