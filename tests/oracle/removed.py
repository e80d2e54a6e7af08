"""Intruder dimensions scaled down by two full decompositions in float64, entry by entry."""

from __future__ import annotations

import numpy as np


def removed(
    base: np.ndarray,
    update: np.ndarray,
    *,
    lam: float,
    top: int | None,
    k: int = 10,
    epsilon: float = 0.5,
    side: str = "left",
) -> tuple[np.ndarray, list[tuple[int, float, float]]]:
    """The update that is left, and ``(index, σ, cosine)`` of what was scaled."""
    old_left, old_values, old_right = np.linalg.svd(base, full_matrices=False)
    left, values, right = np.linalg.svd(base + update, full_matrices=False)
    old = old_left if side == "left" else old_right.T
    real = [i for i, sigma in enumerate(old_values) if sigma > 2.0**-20 * old_values[0]]
    found = []
    for place in range(min(k, len(values))):
        if not values[place] > 2.0**-20 * values[0]:
            continue
        vector = left[:, place] if side == "left" else right[place]
        cosine = max((abs(float(old[:, i] @ vector)) for i in real), default=0.0)
        if cosine < epsilon:
            found.append((place, float(values[place]), cosine))
    found = found[:top]
    new = update.astype(np.float64)
    for place, sigma, _ in found:
        new = new + (lam - 1) * sigma * np.outer(left[:, place], right[place])
    return new, found
