"""Eigenvalues whose power laws are compared with WeightWatcher's; made from fixed seeds."""

from __future__ import annotations

import numpy as np


def eigenvalues() -> dict[str, np.ndarray]:
    """Some lists of 20 values and more: below that WeightWatcher 0.7.7 has another rule."""
    random = np.random.default_rng(4)
    return {
        "pareto": random.pareto(2.0, 300) + 1,
        "gaussian": np.linalg.svd(random.standard_normal((80, 60)))[1] ** 2,
        "heavy": np.linalg.svd(random.standard_t(3, size=(100, 100)))[1] ** 2,
        "uniform": random.random(25) + 0.1,
        "decaying": np.arange(1, 41.0) ** -1.5,
    }
