"""Geometric and selective merge methods as their equations on whole vectors, in float64.

As in ``methods.py``: nothing imports the package, ``models[name]`` and ``deltas[name]`` hold one
array per model, and merged task vectors are returned without their base. No inner products are
shared between models here: directions are vectors, not coefficients of vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from tests.oracle.methods import PerModel, Tensors

Vectors = Sequence[np.ndarray]
NO_DIRECTION = 1e-7


def each_tensor(models: PerModel, merge: Callable[[list[np.ndarray]], np.ndarray]) -> Tensors:
    """Merge every tensor, flattened, by itself."""
    return {
        name: merge([np.asarray(array, np.float64).ravel() for array in arrays]).reshape(
            np.shape(arrays[0])
        )
        for name, arrays in models.items()
    }


def each_row(models: PerModel, merge: Callable[[list[np.ndarray]], np.ndarray]) -> Tensors:
    """Merge every row, a run along the last dimension, by itself."""
    merged: Tensors = {}
    for name, arrays in models.items():
        shape = np.shape(arrays[0])
        length = shape[-1] if shape else 1
        wide = [np.asarray(array, np.float64).reshape(-1, length) for array in arrays]
        rows = [merge([array[row] for array in wide]) for row in range(len(wide[0]))]
        merged[name] = np.array(rows).reshape(shape)
    return merged


def slerp(vectors: Vectors, weights: Sequence[float], threshold: float = 0.9995) -> np.ndarray:
    """Return the point t of the way from one vector to another, t = w_2 / (w_1 + w_2)."""
    if len(vectors) == 1:
        return vectors[0]
    a, b = vectors
    t = weights[1] / sum(weights)
    lengths = math.sqrt(sum(a * a)) * math.sqrt(sum(b * b))
    cosine = sum(a * b) / lengths if lengths else 1.0
    if abs(cosine) > threshold or abs(cosine) >= 1:
        return (1 - t) * a + t * b
    omega = math.acos(cosine)
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


def tangent(u: np.ndarray, m: np.ndarray, *, log: bool) -> np.ndarray:
    """Return log_m(u), or its projection; zero for the pole and its antipode."""
    cosine = float(np.clip(sum(u * m), -1, 1))
    flat = u - cosine * m
    sine = math.sqrt(sum(flat * flat))
    if not log:
        return flat
    return flat * (math.acos(cosine) / sine) if sine > 4e-5 else np.zeros_like(u)


def sphere_mean(
    vectors: Vectors,
    weights: Sequence[float],
    *,
    steps: int = 10,
    tol: float = 1e-5,
    log: bool = True,
    normalize: bool = True,
) -> np.ndarray:
    """Return the mean direction of the vectors times their weighted mean length.

    ``steps`` moves along the weighted mean of tangents, ended by one shorter than ``tol``. Zero
    vectors have no direction; where the others cancel, the weighted arithmetic mean is returned.
    """
    w = [weight / sum(weights) if normalize else weight for weight in weights]
    lengths = [math.sqrt(sum(x * x)) for x in vectors]
    known = [i for i, length in enumerate(lengths) if length > 0]
    total = sum(w[i] for i in known) if normalize else 1.0
    pull = {i: w[i] / (total or 1.0) for i in known}
    units = {i: vectors[i] / lengths[i] for i in known}
    m = sum((pull[i] * units[i] for i in known), np.zeros_like(vectors[0]))
    size = math.sqrt(sum(m * m))
    if size <= NO_DIRECTION:
        return sum((x * weight for x, weight in zip(vectors, w, strict=True)), 0 * vectors[0])
    m = m / size
    for _ in range(steps):
        step = sum((pull[i] * tangent(units[i], m, log=log) for i in known), np.zeros_like(m))
        length = math.sqrt(sum(step * step))
        if length < tol or length == 0:
            break
        m = math.cos(length) * m + math.sin(length) * step / length
    return m * sum(weight * length for weight, length in zip(w, lengths, strict=True))


def stock(vectors: Vectors, weights: Sequence[float], *, clamp: bool = False) -> np.ndarray:
    """Return t · mean(tau), t = N c / (1 + (N - 1) c) with c the mean cosine of pairs."""
    n = len(vectors)
    mean = sum((w * x for w, x in zip(weights, vectors, strict=True)), 0 * vectors[0])
    mean = mean / sum(weights)
    if n == 1:
        return mean
    cosines = []
    for i in range(n):
        for j in range(i):
            lengths = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
            cosines.append(float(vectors[i] @ vectors[j] / lengths) if lengths else 0.0)
    c = sum(cosines) / len(cosines)
    below = 1 + (n - 1) * c
    t = n * c / below if abs(below) > 1e-6 else 0.0
    return (min(max(t, 0.0), 1.0) if clamp else t) * mean


def most_varied(
    vectors: Vectors, select_topk: float, count: Literal["exact", "nonzero"] = "exact"
) -> np.ndarray:
    """Return the mask of the share of entries with the largest variance over models."""
    matrix = np.array(vectors)
    d = matrix.shape[1]
    if select_topk >= 1 or len(matrix) == 1:
        return np.ones(d, bool)
    # In fractions, since entries with the same values in another order must tie.
    exact = [[Fraction(float(x)) for x in column] for column in matrix.T]
    spread = [sum(x * x for x in each) * len(each) - sum(each) ** 2 for each in exact]
    size = d if count == "exact" else sum(each > 0 for each in spread)
    chosen = sorted(range(d), key=lambda j: (-spread[j], j))[: math.floor(select_topk * size)]
    return np.isin(np.arange(d), chosen)


def sce(
    vectors: Vectors,
    weights: Sequence[float],
    mask: np.ndarray,
    *,
    tie: Literal["zero", "plus", "minus"] = "zero",
) -> np.ndarray:
    """Return the SCE merge of the selected entries of one tensor: calculate and erase."""
    matrix = np.where(mask, np.array(vectors), 0.0)
    d = matrix.shape[1]
    eta = np.array(weights) * (matrix**2).sum(axis=1)
    merged = np.zeros(d)
    for j in range(d):
        sign = np.sign(sum(matrix[:, j]))
        if sign == 0:
            sign = {"zero": 0.0, "plus": 1.0, "minus": -1.0}[tie]
        agrees = [i for i in range(len(matrix)) if matrix[i, j] and np.sign(matrix[i, j]) == sign]
        behind = sum(eta[i] for i in agrees)
        if behind:
            merged[j] = sum(eta[i] * matrix[i, j] for i in agrees) / behind
    return merged


def ram(
    vectors: Vectors,
    weights: Sequence[float],
    *,
    epsilon: float = 1e-5,
    r: float = 0.0,
    alpha: float = 0.2,
) -> np.ndarray:
    """Return the mean of overlapping changes and, scaled, what one model alone has changed."""
    n, d = len(vectors), len(vectors[0])
    changed = [[abs(x[j]) > epsilon for j in range(d)] for x in vectors]
    number = [sum(changed[i][j] for i in range(n)) for j in range(d)]
    scale = []
    for i in range(n):
        alone = sum(changed[i][j] and number[j] == 1 for j in range(d))
        shared = sum(changed[i][j] and number[j] > 1 for j in range(d))
        scale.append(1 + r * min(shared / max(alone, 1), alpha))
    merged = np.zeros(d)
    for j in range(d):
        for i in range(n):
            if changed[i][j]:
                factor = scale[i] if number[j] == 1 else 1 / number[j]
                merged[j] += factor * weights[i] * vectors[i][j]
    return merged


def near(vector: np.ndarray, t: float) -> np.ndarray:
    """Return clamp(t / |tau|, 0, 1) · tau."""
    share = np.array([min(t / abs(x), 1.0) if x else 1.0 for x in vector])
    return share * vector


def importance(base: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """Return |tau| · KL(softmax(base + tau) ‖ softmax(base)) by row, of two arrays."""
    if tau.size == 0:
        return tau
    length = tau.shape[-1] if tau.ndim else 1
    theta0 = np.asarray(base, np.longdouble).reshape(-1, length)
    theta1 = theta0 + np.asarray(tau, np.longdouble).reshape(-1, length)

    def softmax(rows: np.ndarray) -> np.ndarray:
        raised = np.exp(rows - rows.max(axis=1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=1, keepdims=True))

    p, q = softmax(theta1), softmax(theta0)
    divergence = (p * np.log(p / q)).sum(axis=1, keepdims=True)
    values = np.abs(theta1 - theta0) * np.maximum(divergence, 0)
    return np.asarray(values, np.float64).reshape(tau.shape)


def importance_limit(values: np.ndarray, iqr: float = 1.5) -> float:
    """Return median + iqr · (Q3 - Q1) of the entries, quantile q the ⌊q (d - 1)⌋-th from below."""
    ordered = sorted(values.ravel())
    low, middle, high = (ordered[math.floor(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    return float(middle + iqr * (high - low))


def fusion(
    base: Mapping[str, np.ndarray], deltas: Mapping[str, np.ndarray], iqr: float = 1.5
) -> Tensors:
    """Return one task vector without the entries of importance below the limit of their tensor."""
    merged: Tensors = {}
    for name, tau in deltas.items():
        values = importance(base[name], np.asarray(tau, np.float64))
        limit = importance_limit(values, iqr) if values.size else 0.0
        merged[name] = np.where(values >= limit, tau, 0.0)
    return merged
