"""Intruder dimensions of one matrix: leading directions that the base does not have.

:func:`intruders` is all that the rest of mergebench knows of how they are found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np

from mergebench.compute.alignment import alignments
from mergebench.compute.decomposition import Decomposition, decompose, leading_triplets
from mergebench.core.errors import MismatchError
from mergebench.core.tensor import Array

Side = Literal["left", "right"]
Status = Literal["exact", "certified"]
Known = Decomposition | Callable[[], Decomposition]

#: Smaller sides are decomposed sooner than bounded.
_WORTH = 512
_PIECE = 1 << 16


@dataclass(frozen=True)
class Direction:
    """One leading singular direction of the tuned matrix.

    Attributes
    ----------
    index : int
        Place among the singular values of the tuned matrix, largest first, from 0.
    sigma : float
        Its singular value.
    cosine : float
        The largest cosine with any singular vector of the base: of absolute values unless
        ``signed``. Where the status is ``certified``, the largest that was found, so at least this.
    status : exact or certified
        From full decompositions, or from bounds that settle every threshold.
    bound : float
        The most that the largest cosine can be; ``cosine`` itself where exact.
    gap : float or None
        Distance to the nearest other singular value of the tuned matrix over the largest one. At 0
        the direction is any of a plane, and its cosine means little. ``None`` where certified:
        bounds allow for it.
    intruder : tuple of bool
        For each ε, whether the largest cosine is below it.
    """

    index: int
    sigma: float
    cosine: float
    status: Status
    bound: float
    gap: float | None
    intruder: tuple[bool, ...]


@dataclass(frozen=True)
class Intruders:
    """What :func:`intruders` found in one matrix.

    Attributes
    ----------
    directions : tuple of Direction
        The leading k, fewer where the tuned matrix has a lower rank.
    epsilons : tuple of float
    dimension, vectors : int
        Of the side looked at, and how many base vectors it has: those whose singular value is
        above 2⁻²⁰ of the largest. Others are arbitrary, and no part of the base. At most so many
        where certified.
    squared : float
        ``‖W‖²`` of the tuned matrix, to which energies are relative.
    triplets : Decomposition or None
        The singular triplets of the directions, in float64, where they were asked for.
    """

    directions: tuple[Direction, ...]
    epsilons: tuple[float, ...]
    dimension: int
    vectors: int
    squared: float
    triplets: Decomposition | None = field(default=None, compare=False, repr=False)

    def count(self, epsilon: float) -> int:
        """How many directions are intruders at a threshold."""
        place = self.epsilons.index(epsilon)
        return sum(each.intruder[place] for each in self.directions)

    def energy(self, epsilon: float) -> float:
        """``Σ σ² / ‖W‖²`` over the intruders at a threshold; 0 for a matrix of zeros."""
        place = self.epsilons.index(epsilon)
        inside = sum(each.sigma**2 for each in self.directions if each.intruder[place])
        return inside / self.squared if self.squared > 0 else 0.0


def intruders(
    base: Array,
    tuned: Array | None = None,
    *,
    k: int = 10,
    epsilons: Sequence[float] = (0.5,),
    side: Side = "left",
    signed: bool = False,
    factors: tuple[Array, Array] | None = None,
    base_svd: Known | None = None,
    tuned_svd: Decomposition | None = None,
    exact: bool = False,
    triplets: bool = False,
) -> Intruders:
    """Compare the leading singular vectors of a tuned matrix with all those of its base.

    A direction j is an intruder at ε where ``max_i |cos(u_i, w_j)| < ε`` (arXiv:2410.21228,
    section 3.1).

    Float32 matrices whose sides are 512 and more are not decomposed where bounds settle every
    threshold (:func:`~mergebench.compute.alignment.alignments`). Elsewhere the base is, whose
    decomposition may be kept; the tuned matrix only where that does not settle them either.

    Parameters
    ----------
    base : array, (n, m)
        The pretrained matrix, output × input.
    tuned : array, (n, m), optional
        The tuned one; ``base + left @ right`` where only ``factors`` are given.
    k : int, default 10
        Leading directions to look at.
    epsilons : sequence of float, default (0.5,)
        Thresholds, all answered from one decomposition.
    side : left (default) or right
        Output or input side.
    signed : bool, default False
        Take the largest cosine, as the paper writes it, instead of the largest absolute one. The
        signs of singular vectors are open, so this depends on their convention (see
        :class:`~mergebench.compute.decomposition.Decomposition`).
    factors : (array (n, r), array (r, m)), optional
        The update as a product, which a faster test may use.
    base_svd, tuned_svd : Decomposition, optional
        If already known; that of the base may be a function that makes it when it is needed. With
        that of the tuned matrix nothing is bounded.
    exact : bool, default False
        Always decompose.
    triplets : bool, default False
        Also return the singular triplets of the directions: from the decomposition of the tuned
        matrix, or refined in float64 from where bounds have found them.

    Raises
    ------
    MismatchError
        For other than two matrices of one shape, and for entries that are not finite.
    """
    base = np.asarray(base)
    if tuned is None:
        if factors is None:
            raise MismatchError("intruders: the tuned matrix or the factors of the update")
        tuned = base + factors[0] @ factors[1]
    tuned = np.asarray(tuned)
    if base.ndim != 2 or base.shape != tuned.shape:
        raise MismatchError(
            "intruders: two matrices of one shape", got=f"{base.shape} and {tuned.shape}"
        )
    if not (np.isfinite(base).all() and np.isfinite(tuned).all()):
        raise MismatchError("intruders: entries that are not finite")
    known = cache(partial(_known, base, base_svd))
    if tuned_svd is None and not signed and not exact:
        bounded = _certified(base, tuned, factors, k, tuple(epsilons), side, triplets, known)
        if bounded is not None:
            return bounded
    below = known()
    held: Any = np.float64 if triplets else np.float32
    above = tuned_svd if tuned_svd is not None else decompose(tuned, held)
    count = min(k, above.rank)
    old = below.side(side)[:, : below.rank]
    new = above.side(side)[:, :count]
    cosines = _largest(old, new, signed)
    gaps = _gaps(above.S, count)
    return Intruders(
        tuple(
            Direction(
                index=place,
                sigma=float(above.S[place]),
                cosine=float(cosines[place]),
                status="exact",
                bound=float(cosines[place]),
                gap=float(gaps[place]),
                intruder=tuple(bool(cosines[place] < each) for each in epsilons),
            )
            for place in range(count)
        ),
        tuple(epsilons),
        base.shape[0 if side == "left" else 1],
        below.rank,
        float(above.S @ above.S),
        above.first(count) if triplets else None,
    )


def _known(base: Array, base_svd: Known | None) -> Decomposition:
    if base_svd is None:
        return decompose(base)
    return base_svd if isinstance(base_svd, Decomposition) else base_svd()


def _certified(
    base: Array,
    tuned: Array,
    factors: tuple[Array, Array] | None,
    k: int,
    epsilons: tuple[float, ...],
    side: Side,
    triplets: bool,
    known: Callable[[], Decomposition],
) -> Intruders | None:
    """What bounds say, if they settle everything."""
    update: Array | tuple[Array, Array] = tuned
    if factors is not None:
        left, right = (each.astype(np.float32) for each in factors)
        update = (left, right) if side == "left" else (right.T, left.T)
    elif side == "right":
        update = tuned.T
    single = base.dtype == np.float32 and (factors is not None or tuned.dtype == np.float32)
    if not single or min(base.shape) < _WORTH:
        return None

    def vectors() -> Array:
        below = known()
        return below.side(side)[:, : below.rank].astype(np.float32, copy=False)

    seen_base = base if side == "left" else base.T
    found = alignments(seen_base, update, k, epsilons, vectors)
    if found is None:
        return None
    directions = tuple(
        Direction(
            index=place,
            sigma=float(sigma),
            cosine=float(lower),
            status="certified",
            bound=float(upper),
            gap=None,
            intruder=tuple(bool(upper < each) for each in epsilons),
        )
        for place, (sigma, lower, upper) in enumerate(zip(*found[:3], strict=True))
    )
    refined = None
    if triplets:
        # Seen from the right side the matrix is its transpose.
        seen = leading_triplets(tuned if side == "left" else tuned.T, found.block, len(directions))
        if seen is None:
            return None
        refined = seen if side == "left" else seen.transposed()
        directions = tuple(
            replace(each, sigma=float(sigma))
            for each, sigma in zip(directions, refined.S, strict=True)
        )
    flat = tuned.reshape(-1)
    squared = sum(
        float(np.square(flat[start : start + _PIECE], dtype=np.float64).sum())
        for start in range(0, flat.size, _PIECE)
    )
    dimension = base.shape[0 if side == "left" else 1]
    return Intruders(directions, epsilons, dimension, min(base.shape), squared, refined)


def _largest(old: Array, new: Array, signed: bool) -> Array:
    """The largest cosine of each new vector; 0 where there is no old one."""
    inside = (old.T @ new).astype(np.float64)
    if not signed:
        inside = np.abs(inside)
    if inside.shape[0] == 0:
        return np.zeros(inside.shape[1])
    return np.asarray(np.clip(inside.max(axis=0), -1.0, 1.0))


def _gaps(values: Array, count: int) -> Array:
    """Distance of each of the first values to its nearest neighbour, over the largest value."""
    if count == 0:
        return np.zeros(0)
    apart = -np.diff(values) / values[0]
    both = np.concatenate([[np.inf], apart, [np.inf]])
    gaps = np.minimum(both[:-1], both[1:])[:count]
    return np.where(np.isfinite(gaps), gaps, 1.0)
