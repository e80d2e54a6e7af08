"""WIDEN written out column by column in float64, to test the package against.

Nothing imports the package. ``units`` below are lists of vectors: the columns of a weight out × in,
or the tokens of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import numpy as np

Array = np.ndarray


def divergence(tuned: Array, base: Array) -> tuple[float, float]:
    """How much longer or shorter, and 1 - cos; 1 between a vector of zeros and any other."""
    sizes = float(np.linalg.norm(tuned)), float(np.linalg.norm(base))
    if min(sizes) == 0:
        return abs(sizes[0] - sizes[1]), float(max(sizes) > 0)
    return abs(sizes[0] - sizes[1]), 1 - float(tuned @ base) / sizes[0] / sizes[1]


def ranks(values: Sequence[float]) -> list[float]:
    """Share of the values that each leaves behind; of equals (to 1e-9) the later one leads."""
    steps = [round(value * 1e9) for value in values]
    order = sorted(range(len(steps)), key=lambda j: (steps[j], j))
    return [order.index(j) / len(steps) for j in range(len(steps))]


def scores(rows: Sequence[Sequence[float]], ratio: float, calibration: float) -> list[list[float]]:
    """Softmax over rows; calibrated above ``ratio`` times the mean of the row."""
    found = []
    for row in rows:
        bar = ratio * sum(row) / len(row)
        line = []
        for j, value in enumerate(row):
            if value > bar + 1e-12 * abs(bar):
                line.append(calibration)
            else:
                line.append(exp(value) / sum(exp(other[j]) for other in rows))
        found.append(line)
    return found


def widen(
    base: Array,
    taus: Sequence[Array],
    weights: Sequence[float],
    ratio: float = 1.0,
    calibration: float = 1.0,
    unit: str = "column",
) -> Array:
    """The merged update of one tensor; ``unit`` is column, row or entry."""
    if base.size == 0:
        return np.zeros(base.shape)
    if unit == "entry":
        flat = [np.abs(tau).reshape(-1).tolist() for tau in taus]
        found = [np.reshape(line, base.shape) for line in scores(flat, ratio, calibration)]
        return sum(
            (w * np.multiply(s, tau) for w, s, tau in zip(weights, found, taus, strict=True)),
            np.zeros(base.shape),
        )
    shape = base.shape
    matrices = [np.reshape(each, (shape[0], -1)) for each in (base, *taus)]
    if unit == "row":
        matrices = [each.T for each in matrices]
    base, *taus = matrices
    lengths, angles = [], []
    for tau in taus:
        pairs = [divergence(base[:, j] + tau[:, j], base[:, j]) for j in range(base.shape[1])]
        lengths.append(ranks([pair[0] for pair in pairs]))
        angles.append(ranks([pair[1] for pair in pairs]))
    one, other = (scores(each, ratio, calibration) for each in (lengths, angles))
    merged = np.zeros(base.shape)
    for i, tau in enumerate(taus):
        for j in range(base.shape[1]):
            merged[:, j] += weights[i] * (one[i][j] + other[i][j]) / 2 * tau[:, j]
    return np.reshape(merged.T if unit == "row" else merged, shape)
