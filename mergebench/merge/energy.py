"""Ranks of a written LoRA by the share of each update's squared norm that they keep."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mergebench.compute.threads import one_thread
from mergebench.compute.tiles import Tiling
from mergebench.core.tensor import Array
from mergebench.merge.align import Aligned
from mergebench.merge.factors import singular_values
from mergebench.merge.stream import Evaluator
from mergebench.merge.variants import Variant


def ranks_by_energy(
    aligned: Aligned, variants: Sequence[Variant], tiling: Tiling, energy: float
) -> dict[str, int]:
    """The least rank of each merged update that keeps ``energy`` of its squared Frobenius norm.

    The factors are read and merged for it, and merged again when they are written: ranks fix the
    places of everything in the file.

    Parameters
    ----------
    aligned : Aligned
    variants : sequence of Variant
        Outputs that share a layout; the largest of their ranks counts.
    tiling : Tiling
    energy : float in (0, 1]

    Returns
    -------
    dict of tensor name to int, at least 1
    """
    found: dict[str, int] = {}
    with one_thread(), ThreadPoolExecutor(tiling.workers) as pool:
        evaluator = Evaluator(aligned.items, tiling, pool)
        for name, item in aligned.items.items():
            ranks = []
            for variant in variants:
                evaluator.prepare(variant.at(name), item)
                ranks.append(rank_of(singular_values(evaluator, variant, item), energy))
            found[name] = max(ranks)
    return found


def rank_of(values: Array, energy: float) -> int:
    """The least k with ``Σ_{i≤k} σᵢ² ≥ energy · Σ σᵢ²``, at least 1.

    Parameters
    ----------
    values : float64 array, (k,)
        Singular values, the largest first.
    energy : float in (0, 1]
    """
    kept = np.cumsum(values**2)
    if not kept.size or kept[-1] == 0:
        return 1
    # All of the energy is that of the values above float64's rounding.
    return int(np.searchsorted(kept, energy * kept[-1] * (1 - 1e-14))) + 1
