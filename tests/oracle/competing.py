"""PCB-Merging written out in float64 on flattened models; see :mod:`tests.oracle.methods`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracle.methods import PerModel, Tensors, _flatten, _unflatten


def norm(values: np.ndarray) -> np.ndarray:
    """Every row from its smallest and largest value to 0 and 1; zeros where they are equal."""
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    return np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 0.0)


def softmax(values: np.ndarray) -> np.ndarray:
    """Along the entries of every row."""
    shifted = np.exp(values - values.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def pcb(
    deltas: PerModel,
    weights: Sequence[float],
    *,
    ratio: float,
    clip: float,
    variant: str,
    normalize: bool,
) -> Tensors:
    """Return the merged task vector, without λ."""
    tau = _flatten(deltas)
    count, size = tau.shape
    sorted_place = int(size * (1 - ratio))
    values = tau
    if variant == "code":
        ascending = np.sort(np.abs(tau), axis=1)
        low, high = ascending[:, int(size * clip)], ascending[:, int(size * (1 - clip) - 1)]
        magnitudes = np.clip(np.abs(tau), low[:, None], high[:, None])
        values = np.sign(tau) * magnitudes
        found = np.exp(count * norm(magnitudes) ** 2) * np.tanh(tau * tau.sum(axis=0))
        bars = np.sort(found, axis=1)[:, sorted_place][:, None]
        scores = norm(np.maximum(found, bars))
    else:
        own = softmax(count * norm(tau * tau))
        others = np.array([softmax(norm(row * tau)).sum(axis=0) for row in tau])
        found = own * others
        bars = np.sort(found, axis=1)[:, sorted_place][:, None]
        scores = np.where(found >= bars, found, 0.0)
    total = (np.asarray(weights, np.float64)[:, None] * values * scores).sum(axis=0)
    if normalize:
        behind = scores.sum(axis=0)
        total = np.where(behind > 0, total / np.where(behind > 0, behind, 1), 0.0)
    elif variant == "paper":
        # Softmaxes are as small as the model is large: the package has 1 for the largest.
        total = total / found.max()
    return _unflatten(total, deltas)
