"""Numbers of a list of singular values; the formulas, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergebench.compute.decomposition import numerical_rank
from mergebench.core.tensor import Array

#: Eigenvalues up to here are left out of a power-law fit, and fewer than so many are not fitted.
SMALLEST, FEWEST = 1e-5, 10


def effective_rank(values: Array) -> float:
    """``exp(H(σ / Σσ))``, H the entropy: how many equal singular values would be as spread.

    Roy & Vetterli 2007, as used in arXiv:2410.21228, section 4. 0 for a matrix of zeros.
    """
    kept = values[values > 0]
    if kept.size == 0:
        return 0.0
    # Scaled first: the sum of tiny values may lie below what float64 divides by.
    share = kept / kept.max()
    share = share / share.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def stable_rank(values: Array) -> float:
    """``‖W‖²_F / ‖W‖²_2``; 0 for a matrix of zeros."""
    if values.size == 0 or values[0] <= 0:
        return 0.0
    return float(((values / values[0]) ** 2).sum())


def energy(values: Array) -> Array:
    """``Σ_{i ≤ k} σ_i² / Σ σ²`` for k = 1 … r; empty for a matrix of zeros."""
    if values.size == 0 or values[0] <= 0:
        return np.zeros(0)
    squares = (values / values[0]) ** 2
    reached = np.cumsum(squares)
    return np.asarray(reached / reached[-1])


def rank_for(values: Array, share: float) -> int:
    """The fewest leading singular values whose squares reach a share of the sum of all."""
    reached = energy(values)
    if reached.size == 0:
        return 0
    # Sums of squares round in their last digits.
    return min(int(np.count_nonzero(reached < share - 1e-12)) + 1, numerical_rank(values))


def elbow(values: Array) -> int:
    """How many singular values stand before the curve bends: mergebench's rule.

    The place of the curve k ↦ σ_k that is farthest below the chord from its first to its last value
    begins what is left out. 0 for a matrix of zeros, and all where nothing bends.
    """
    rank = numerical_rank(values)
    if rank < 3:
        return rank
    kept = values[:rank]
    along = np.linspace(0.0, 1.0, rank)
    fallen = (kept[0] - kept) / (kept[0] - kept[-1]) if kept[0] > kept[-1] else along
    below = fallen - along
    return int(below.argmax()) if below.max() > 1e-9 else rank


def pela_rank(rows: int, columns: int) -> int:
    """``⌊nm / (3 (n + m))⌋``, PELA's: a third of the parameters; at least 1 (arXiv:2310.10700)."""
    return max(rows * columns // (3 * (rows + columns)), 1)


def curve(values: Array, points: int) -> list[dict[str, float]]:
    """Singular values and the energy up to them, at some places spread evenly in their logarithm.

    Parameters
    ----------
    values : array, falling
    points : int
        How many at most, the first and the last among them; 0 for all.
    """
    count = len(values)
    places = np.arange(count)
    if points and count > points:
        places = np.unique(np.round(np.geomspace(1, count, points)).astype(int)) - 1
    reached = energy(values)
    return [
        {
            "index": int(place),
            "sigma": float(values[place]),
            "energy": float(reached[place]) if reached.size else 0.0,
        }
        for place in places
    ]


@dataclass(frozen=True)
class PowerLaw:
    """A tail ``p(λ) ∝ λ^-α`` above ``smallest``.

    Attributes
    ----------
    alpha : float
    distance : float
        Kolmogorov-Smirnov distance between the tail and the fit.
    smallest, largest : float
        Where the tail begins, and the largest eigenvalue.
    tail : int
        Eigenvalues in it.
    """

    alpha: float
    distance: float
    smallest: float
    largest: float
    tail: int

    @property
    def error(self) -> float:
        """Standard error ``(α - 1) / √n``."""
        return float((self.alpha - 1) / np.sqrt(self.tail))

    @property
    def weighted(self) -> float:
        """``α · log10 λ_max``."""
        return float(self.alpha * np.log10(self.largest))


def power_law(eigenvalues: Array) -> PowerLaw | None:
    """Fit a power law to the tail, as WeightWatcher does (arXiv:2002.06716).

    Every eigenvalue but the largest is tried as the beginning of the tail; α is the maximum
    likelihood estimate ``1 + n / Σ ln(λ / λ_min)``, and the tail whose distribution is nearest to
    its fit is taken.

    Parameters
    ----------
    eigenvalues : array
        Any order, all positive.

    Returns
    -------
    PowerLaw or None
        ``None`` where no tail varies.
    """
    rising = np.sort(np.asarray(eigenvalues, np.float64))
    count = rising.size
    if count < 2:
        return None
    logs = np.log(rising)
    sums = np.cumsum(logs[::-1])[::-1]
    best: PowerLaw | None = None
    for start in range(count - 1):
        size = count - start
        spread = float(sums[start] - size * logs[start])
        if spread <= size * 1e-12:
            continue
        alpha = 1.0 + size / spread
        with np.errstate(under="ignore"):
            fitted = -np.expm1((1.0 - alpha) * (logs[start:] - logs[start]))
        distance = float(np.abs(fitted - np.arange(size) / size).max())
        if best is None or distance < best.distance:
            best = PowerLaw(alpha, distance, float(rising[start]), float(rising[-1]), size)
    return best
