"""Methods with one result per task, flattened and written out with numpy in float64.

Nothing here imports the package. A task vector is a mapping of tensor name to float64 array; what
comes out is one such mapping per task. Similarities, groups and singular values are computed
another way than in the package: from whole flat vectors, by trying all pairs again in every step,
and from eigenvectors of Gram matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

import numpy as np

Tau = Mapping[str, np.ndarray]
Groups = dict[str, list[list[int]]]


def flat(tau: Tau, names: Sequence[str]) -> np.ndarray:
    """Some tensors of a task vector behind each other."""
    return np.concatenate([np.ravel(tau[name]) for name in names])


def like(vector: np.ndarray, tau: Tau) -> dict[str, np.ndarray]:
    """All tensors of a task vector from one behind the other."""
    found, start = {}, 0
    for name, array in tau.items():
        found[name] = vector[start : start + array.size].reshape(array.shape)
        start += array.size
    return found


def emr(taus: Sequence[Tau], over: str = "entries") -> list[dict[str, np.ndarray]]:
    """``s_i m_i τ``: the elected vector, masked and rescaled for every task."""
    names = list(taus[0])
    vectors = np.array([flat(tau, names) for tau in taus])
    sign = np.where(vectors.sum(axis=0) > 0, 1.0, -1.0)
    agree = vectors * sign > 0
    unified = sign * np.where(agree, np.abs(vectors), 0).max(axis=0)
    sizes = [taus[0][name].size for name in names]
    each = np.repeat([1 / size if size else 0 for size in sizes], sizes)
    share = each if over == "tensors" else np.ones_like(each)
    found = []
    for vector, mask in zip(vectors, agree, strict=True):
        kept = unified * mask
        below = (np.abs(kept) * share).sum()
        scale = (np.abs(vector) * share).sum() / below if below else 0.0
        found.append(like(scale * kept, taus[0]))
    return found


def tall_masks(
    taus: Sequence[Tau], weights: Sequence[float], mask_lam: float
) -> list[dict[str, np.ndarray]]:
    """``m_t τ``: the merged entries that are near enough to the task's own."""
    names = list(taus[0])
    vectors = [flat(tau, names) for tau in taus]
    total = np.zeros_like(vectors[0])
    for weight, vector in zip(weights, vectors, strict=True):
        total = total + weight * vector
    return [
        like(np.where(np.abs(v) > mask_lam * np.abs(total - v), total, 0.0), taus[0])
        for v in vectors
    ]


def low_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The projection on the leading eigenvectors of ``XᵀX`` (or ``XXᵀ``, if that is smaller)."""
    if matrix.shape[0] < matrix.shape[1]:
        return low_rank(matrix.T, rank).T
    _, vectors = np.linalg.eigh(matrix.T @ matrix)
    leading = vectors[:, ::-1][:, :rank]
    return matrix @ leading @ leading.T


def as_matrix(array: np.ndarray, kernels: str) -> np.ndarray | None:
    """Out × in, where a tensor counts as a matrix."""
    if array.size == 0 or array.ndim < 2 or (array.ndim > 2 and kernels == "vector"):
        return None
    return array.reshape(array.shape[0], -1)


def compressed(array: np.ndarray, share: float, kernels: str) -> np.ndarray:
    """A share of singular values, or one over a whole number of tasks of them; at least one."""
    matrix = as_matrix(array, kernels)
    if matrix is None:
        return array
    full = min(matrix.shape)
    kept = full // share if isinstance(share, int) else int(share * full)
    return low_rank(matrix, max(kept, 1)).reshape(array.shape)


def tsv_compress(
    taus: Sequence[Tau], share: float | None, kernels: str
) -> list[dict[str, np.ndarray]]:
    """Every task vector at a rank of its own."""
    kept: float = len(taus) if share is None else share
    return [{n: compressed(array, kept, kernels) for n, array in tau.items()} for tau in taus]


def twin(
    taus: Sequence[Tau], density: float, lam: float, kernels: str
) -> list[dict[str, np.ndarray]]:
    """``τ* + SVD_k(τ_t - τ*)``; vectors have no compressed form."""
    shared = {n: lam * sum(tau[n] for tau in taus) for n in taus[0]}
    if density == 0:
        return [shared] * len(taus)
    return [
        {n: shared[n] + compressed(tau[n] - shared[n], density, kernels) for n in tau}
        for tau in taus
    ]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Two zeros are alike, one and another are at right angles."""
    lengths = np.linalg.norm(one), np.linalg.norm(other)
    if 0 in lengths:
        return float(lengths == (0, 0))
    return float(one @ other / lengths[0] / lengths[1])


LINKS: Mapping[str, Callable[[list[float]], float]] = {
    "complete": min,
    "single": max,
    "average": lambda cosines: sum(cosines) / len(cosines),
}


def groups(
    taus: Sequence[Tau], blocks: Mapping[str, Sequence[str]], size: float, linkage: str
) -> Groups:
    """Tasks that share a block, block by block."""
    found: Groups = {block: [[task] for task in range(len(taus))] for block in blocks}
    entries = {b: sum(taus[0][name].size for name in names) for b, names in blocks.items()}
    vectors = {b: [flat(tau, names) for tau in taus] for b, names in blocks.items()}

    def stored() -> int:
        return sum(entries[block] * len(each) for block, each in found.items())

    while stored() > size * sum(entries.values()):
        best = None
        for block in sorted(found):
            for one, other in combinations(found[block], 2):
                pairs = product(one, other)
                alike = LINKS[linkage]([cosine(*(vectors[block][t] for t in p)) for p in pairs])
                if best is None or alike > best[0]:
                    best = alike, block, one, other
        if best is None:
            break
        _, block, one, other = best
        found[block].remove(other)
        one += other
    return found


def flexmerge(
    taus: Sequence[Tau],
    trimmed: Sequence[Tau],
    blocks: Mapping[str, Sequence[str]],
    size: float,
    merger: str,
    lam: float,
    linkage: str,
) -> list[dict[str, np.ndarray]]:
    """What every task has of every block: its own, or what it shares."""
    found = [dict(tau) for tau in taus]
    for block, parts in groups(taus, blocks, size, linkage).items():
        for members in parts:
            for name in blocks[block] if len(members) > 1 else ():
                stack = np.array([trimmed[task][name] for task in members])
                shared = stack.mean(axis=0)
                if merger == "ties":
                    agree = stack * stack.sum(axis=0) > 0
                    shared = np.where(agree, stack, 0).sum(axis=0) / np.maximum(
                        agree.sum(axis=0), 1
                    )
                for task in members:
                    found[task][name] = lam * shared
    return found
