"""Merging low-rank inputs in bases of their joint column and row spaces (arXiv:2509.17786).

With ``U`` a basis of the columns of all ``B_t`` and ``V`` one of the rows of all ``A_t`` an update
``B_t A_t`` is exactly ``U M_t Vᵀ`` with ``M_t = Uᵀ B_t A_t V``, whatever the ranks. An op that
commutes with orthonormal changes of basis gives ``U op(M_1, …) Vᵀ``: the result of the full
matrices at the cost of matrices whose sides are the summed rank, and factored again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mergebench.compute.spectra import spectrum, svd_bytes
from mergebench.core.delta import LowRank, factors
from mergebench.core.tensor import Array, ArrayTensor
from mergebench.merge.at import At
from mergebench.merge.chains import is_linear, sides_of
from mergebench.merge.item import Item, nonfinite
from mergebench.merge.op import Chain, Sides

_WIDE = np.dtype(np.float64)
#: Columns that depend on the others to float64's precision add nothing to a basis.
_DEPENDENT = 1e-13


def fits(ops: Chain, item: Item) -> bool:
    """Whether a chain runs on the factors of an item: all inputs low-rank, and a chain that may.

    Linear chains need no bases: their tiles cost no more than a sum.
    """
    low = [delta for delta in item.deltas if delta is not None]
    factored = bool(low) and all(isinstance(delta, LowRank) for delta in low)
    return factored and not is_linear(ops) and sides_of(ops) != "none"


def merged_factors(
    run: Callable[[At, Array], Array], ops: Chain, item: Item
) -> tuple[Array, Array]:
    """``(L, R)`` of the merged update in the stored orientation, balanced: ``LᵀL = RRᵀ``.

    Parameters
    ----------
    run : callable ``(at, stack) -> stack``
        The chain.
    item : Item
        One that :func:`fits`.

    Returns
    -------
    float64 arrays, (rows, r) and (r, columns)
        r is at most the dimension of the space that the inputs span, and at least 1.

    Raises
    ------
    MergebenchError
        If a factor holds NaN or infinity, naming model and tensor.
    """
    pairs = [factors(d, _WIDE) if isinstance(d, LowRank) else None for d in item.deltas]
    if not all(np.isfinite(part).all() for pair in pairs if pair is not None for part in pair):
        raise nonfinite(item)
    lefts = [pair[0] for pair in pairs if pair is not None]
    rights = [pair[1].T for pair in pairs if pair is not None]
    sides = _stored(sides_of(ops), item)
    left = _basis(lefts) if sides in ("both", "left") else None
    right = _basis(rights) if sides in ("both", "right") else None
    if (left is not None and not left.size) or (right is not None and not right.size):
        return np.zeros((lefts[0].shape[0], 1)), np.zeros((1, rights[0].shape[0]))
    stack = np.stack([_inside(pair, left, right, lefts[0], rights[0]) for pair in pairs])
    shape = (stack.shape[1], stack.shape[2])
    at = replace(item.at(0, shape[0] * shape[1]), core=shape)
    merged = run(at, stack.reshape(len(pairs), -1)).reshape(shape)
    if not np.isfinite(merged).all():
        raise nonfinite(item)
    U, S, Vt, _ = spectrum(merged)
    kept = max(int(np.count_nonzero(S[0] * _DEPENDENT < S)), 1)
    # Signs are open; the largest entry of each left vector is made positive.
    U, Vt = U[:, :kept], Vt[:kept]
    peaks = U[np.abs(U).argmax(axis=0), np.arange(kept)]
    root = np.sqrt(S[:kept]) * np.where(peaks < 0, -1.0, 1.0)
    U, Vt = U * root, root[:, None] * Vt
    return (U if left is None else left @ U), (Vt if right is None else Vt @ right.T)


def merged_item(run: Callable[[At, Array], Array], ops: Chain, item: Item) -> Item:
    """An item whose only displacement is the merged update, in factors; to be added to the base."""
    left, right = merged_factors(run, ops, item)
    delta = LowRank(ArrayTensor(left), ArrayTensor(right), 1.0, item.site.shape)
    return replace(item, deltas=(delta,), weights=(1.0,), labels=("the merged update",))


def core_bytes(item: Item, workspaces: Callable[[int, int, int], int]) -> int:
    """Memory of :func:`merged_factors`: factors, bases, small matrices and the chain on them."""
    rows, columns = item.site.shape[0], item.site.size // item.site.shape[0]
    rank = sum(delta.rank for delta in item.deltas if isinstance(delta, LowRank))
    tall, wide = min(rank, rows), min(rank, columns)
    bases = 8 * 4 * rank * (rows + columns) + svd_bytes(rows, rank) + svd_bytes(rank, columns)
    small = 8 * 4 * len(item.deltas) * tall * wide + svd_bytes(tall, wide)
    return bases + small + workspaces(len(item.deltas), tall, wide)


def _stored(sides: Sides, item: Item) -> str:
    """The sides of the stored matrix; left of out × in is right of input × output."""
    return "right" if sides == "left" and item.site.transposed else sides


def _basis(blocks: list[Array]) -> Array:
    """Orthonormal columns that span the columns of all blocks, (m, k)."""
    columns = np.concatenate(blocks, axis=1)
    norms = np.linalg.norm(columns, axis=0)
    # Of unit length, so that what a small update adds is not lost beside a large one.
    columns = columns[:, norms > 0] / norms[norms > 0]
    if not columns.size:
        return np.zeros((columns.shape[0], 0))
    U, S, _, _ = spectrum(columns)
    return np.ascontiguousarray(U[:, S[0] * _DEPENDENT < S])


def _inside(
    pair: tuple[Array, Array] | None,
    left: Array | None,
    right: Array | None,
    tall: Array,
    wide: Array,
) -> Array:
    """``Uᵀ L R V``; a missing basis is the identity."""
    rows = tall.shape[0] if left is None else left.shape[1]
    columns = wide.shape[0] if right is None else right.shape[1]
    if pair is None:
        return np.zeros((rows, columns))
    own_left = pair[0] if left is None else left.T @ pair[0]
    own_right = pair[1] if right is None else pair[1] @ right
    found: Array = own_left @ own_right
    return found
