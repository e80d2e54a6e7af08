"""Merge methods written out as their equations, in float64 NumPy, to test the package against.

Nothing here is fast and nothing here imports the package. Every function takes plain arrays in a
dictionary and returns float64 arrays under the same names:

* ``models[name]`` is a list with one array per model, all of the shape of parameter ``name``;
* ``deltas[name]`` is a list with one task vector tau_i = theta_i - theta_0 per fine-tune.

A merged task vector is returned as such; ``apply_to_base`` turns it into parameters,
theta_0 + lambda * merged. Entries are put in one order everywhere: by the bytes of the tensor's
name, then by the flat (row-major) index. Where magnitudes are equal, the earlier entry counts as
the larger one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

PerModel = Mapping[str, Sequence[np.ndarray]]
Tensors = dict[str, np.ndarray]

Scope = Literal["row", "tensor", "model"]
Count = Literal["exact", "at_least_one", "official"]
Sign = Literal["mass", "count"]
Election = Literal["unweighted", "weighted"]
Tie = Literal["majority", "plus", "minus", "zero"]
Divisor = Literal["count", "weights", "none", "max"]
ZeroDivisor = Literal["zero", "one"]
Conflict = Literal["remove", "keep"]


# ---------------------------------------------------------------------------------------------
# Shared pieces


def task_vectors(base: Mapping[str, np.ndarray], models: PerModel) -> dict[str, list[np.ndarray]]:
    """Return tau_i = theta_i - theta_0 per tensor, subtracted in float32, given as float64.

    ``base[name]`` is theta_0 and ``models[name]`` the list of theta_i; any real dtype.
    """
    return {
        name: [
            (np.asarray(theta, np.float32) - np.asarray(base[name], np.float32)).astype(np.float64)
            for theta in thetas
        ]
        for name, thetas in models.items()
    }


def apply_to_base(base: Mapping[str, np.ndarray], merged: Tensors, lam: float = 1.0) -> Tensors:
    """Return theta_0 + ``lam`` * merged, in float64."""
    return {name: np.asarray(base[name], np.float64) + lam * merged[name] for name in merged}


def _names(tensors: PerModel) -> list[str]:
    return sorted(tensors, key=lambda name: name.encode())


def _flatten(tensors: PerModel) -> np.ndarray:
    """Return the float64 matrix [models, entries] of all tensors concatenated in order."""
    names = _names(tensors)
    if not names:
        raise ValueError("there is no tensor to merge")
    models = range(len(tensors[names[0]]))
    return np.array(
        [
            np.concatenate([np.asarray(tensors[name][i], np.float64).ravel() for name in names])
            for i in models
        ]
    )


def _unflatten(flat: np.ndarray, tensors: PerModel) -> Tensors:
    """Cut a vector [entries] back into the tensors that ``_flatten`` concatenated."""
    parts: Tensors = {}
    start = 0
    for name in _names(tensors):
        shape = np.shape(tensors[name][0])
        size = math.prod(shape)
        parts[name] = flat[start : start + size].reshape(shape)
        start += size
    return parts


def blocks(tensors: PerModel, scope: Scope) -> list[slice]:
    """Return the stretches of the concatenated entries that are trimmed on their own.

    A row is a run along the last dimension; a tensor of one dimension, or of none, is one row.
    """
    found: list[slice] = []
    start = 0
    for name in _names(tensors):
        shape = np.shape(tensors[name][0])
        size = math.prod(shape)
        length = shape[-1] if scope == "row" and shape else size
        if length:
            found += [slice(at, at + length) for at in range(start, start + size, length)]
        start += size
    return [slice(0, start)] if scope == "model" else found


def _largest_first(values: np.ndarray) -> list[int]:
    """Return the indices of ``values`` by falling magnitude, the earlier of equals first."""
    return sorted(range(len(values)), key=lambda j: (-abs(values[j]), j))


def _per_model(value: float | Sequence[float] | None, models: int) -> list[float]:
    """Return one number per model; a single number is meant for all, ``None`` is 1."""
    if value is None:
        return [1.0] * models
    if isinstance(value, int | float):
        return [float(value)] * models
    if len(value) != models:
        raise ValueError(f"{len(value)} values were given for {models} models")
    return [float(v) for v in value]


def _weighted_sum(matrix: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    total = np.zeros(matrix.shape[1])
    for weight, row in zip(weights, matrix, strict=True):
        total = total + weight * row
    return total


# ---------------------------------------------------------------------------------------------
# Averages


def linear(
    models: PerModel, weights: Sequence[float] | None = None, normalize: bool = True
) -> Tensors:
    """Return sum_i w_i theta_i, divided by sum_i w_i if ``normalize``.

    ``weights`` has one number per model and defaults to all ones. There is no base model.
    """
    matrix = _flatten(models)
    w = _per_model(weights, len(matrix))
    total = _weighted_sum(matrix, w)
    return _unflatten(total / sum(w) if normalize else total, models)


def task_arithmetic(deltas: PerModel, weights: Sequence[float] | None = None) -> Tensors:
    """Return the merged task vector sum_i w_i tau_i; ``weights`` defaults to all ones."""
    matrix = _flatten(deltas)
    return _unflatten(_weighted_sum(matrix, _per_model(weights, len(matrix))), deltas)


# ---------------------------------------------------------------------------------------------
# TIES


def keep_largest(values: np.ndarray, density: float, count: Count) -> np.ndarray:
    """Return the boolean mask of the entries of a vector [d] that trimming keeps.

    ``count="exact"`` keeps the k = floor(density * d) largest magnitudes; ``"at_least_one"``
    keeps max(1, k); ``"official"`` keeps every magnitude at or above the (d - k)-th smallest
    one, which is k + 1 entries and whatever is equal to the last of them, or all if k = d.
    """
    d = len(values)
    k = math.floor(density * d)
    kept = np.zeros(d, bool)
    if d == 0:
        return kept
    if count == "official":
        if k >= d:
            return ~kept
        threshold = sorted(abs(values))[d - k - 1]
        return np.asarray(abs(values) >= threshold)
    if count == "at_least_one":
        k = max(1, k)
    kept[_largest_first(values)[:k]] = True
    return kept


def ties_mask(
    deltas: PerModel,
    density: float | Sequence[float],
    scope: Scope,
    count: Count,
) -> np.ndarray:
    """Return the boolean matrix [models, entries] of what TIES keeps of each task vector."""
    matrix = _flatten(deltas)
    mask = np.zeros(matrix.shape, bool)
    for i, share in enumerate(_per_model(density, len(matrix))):
        for block in blocks(deltas, scope):
            mask[i, block] = keep_largest(matrix[i, block], share, count)
    return mask


def elect(
    trimmed: np.ndarray,
    weights: Sequence[float],
    *,
    sign: Sign,
    election: Election,
    tie: Tie,
) -> np.ndarray:
    """Return the elected sign of each entry, [entries] of -1, 0 or 1.

    ``trimmed`` is [models, entries] with zeros where a task vector was trimmed. The vote of
    model i is tau_i (``election="unweighted"``) or w_i tau_i (``"weighted"``), taken whole
    (``sign="mass"``) or as its sign only (``"count"``). Where the votes add up to zero, ``tie``
    decides: ``"plus"``, ``"minus"``, ``"zero"`` (the entry is dropped) or ``"majority"``, the
    sign of the sum of all other elected signs (negative if that is zero too).
    """
    votes = _votes(trimmed, weights, election)
    if sign == "count":
        votes = np.sign(votes)
    elected = np.sign(_weighted_sum(votes, [1.0] * len(votes)))
    majority = 1.0 if elected.sum() > 0 else -1.0
    instead = {"majority": majority, "plus": 1.0, "minus": -1.0, "zero": 0.0}[tie]
    return np.where(elected == 0, instead, elected)


def _votes(trimmed: np.ndarray, weights: Sequence[float], election: Election) -> np.ndarray:
    if election == "unweighted":
        return trimmed
    return trimmed * np.asarray(weights, np.float64)[:, None]


def merge_agreeing(
    trimmed: np.ndarray,
    weights: Sequence[float],
    elected: np.ndarray,
    *,
    election: Election,
    divisor: Divisor,
    zero_divisor: ZeroDivisor,
) -> np.ndarray:
    """Return the disjoint merge [entries] of the values whose vote has the elected sign.

    A vote of zero agrees with no sign. Over the agreeing models A of an entry the result is
    ``"count"``: sum_A w_i tau_i / max(1, |A|); ``"weights"``: sum_A w_i tau_i / sum_A w_i;
    ``"none"``: sum_A w_i tau_i; ``"max"``: the w_i tau_i of largest magnitude. Where the sum of
    weights is exactly 0, ``zero_divisor="zero"`` gives 0 and ``"one"`` the undivided sum.
    """
    votes = _votes(trimmed, weights, election)
    merged = np.zeros(trimmed.shape[1])
    for j in range(trimmed.shape[1]):
        agreeing = [
            i
            for i in range(len(trimmed))
            if votes[i, j] != 0 and np.sign(votes[i, j]) == elected[j]
        ]
        values = [weights[i] * trimmed[i, j] for i in agreeing]
        if not agreeing:
            continue
        if divisor == "max":
            merged[j] = max(values, key=abs)
            continue
        total = sum(values)
        if divisor == "count":
            total = total / len(agreeing)
        elif divisor == "weights":
            weight = sum(weights[i] for i in agreeing)
            if weight != 0:
                total = total / weight
            elif zero_divisor == "zero":
                total = 0.0
        merged[j] = total
    return merged


def ties(
    deltas: PerModel,
    *,
    density: float | Sequence[float] = 0.2,
    weights: Sequence[float] | None = None,
    scope: Scope = "model",
    count: Count = "official",
    sign: Sign = "mass",
    election: Election = "unweighted",
    tie: Tie = "majority",
    divisor: Divisor = "count",
    zero_divisor: ZeroDivisor = "zero",
) -> Tensors:
    """Return the TIES merge of task vectors: trim, elect a sign, merge what agrees with it.

    ``density`` is the kept share, one number or one per model; ``weights`` one per model, all
    ones by default. The other defaults are the paper's code; see ``keep_largest`` (``count``),
    ``blocks`` (``scope``), ``elect`` (``sign``, ``election``, ``tie``) and ``merge_agreeing``
    (``divisor``, ``zero_divisor``).
    """
    mask = ties_mask(deltas, density, scope, count)
    matrix = _flatten(deltas)
    w = _per_model(weights, len(matrix))
    trimmed = np.where(mask, matrix, 0.0)
    elected = elect(trimmed, w, sign=sign, election=election, tie=tie)
    merged = merge_agreeing(
        trimmed, w, elected, election=election, divisor=divisor, zero_divisor=zero_divisor
    )
    return _unflatten(merged, deltas)


def ties_mergekit(
    deltas: PerModel,
    *,
    density: float | Sequence[float],
    weights: Sequence[float] | None = None,
    normalize: bool = True,
) -> Tensors:
    """Return TIES as mergekit 0.1.5 was observed to compute it."""
    return ties(
        deltas,
        density=density,
        weights=weights,
        scope="tensor",
        count="at_least_one",
        election="weighted",
        tie="plus",
        divisor="weights" if normalize else "none",
        zero_divisor="one",
    )


def ties_peft(
    deltas: PerModel, *, density: float | Sequence[float], weights: Sequence[float] | None = None
) -> Tensors:
    """Return TIES as PEFT does: an unweighted election per tensor, weights in the mean only."""
    return ties(
        deltas,
        density=density,
        weights=weights,
        scope="tensor",
        count="exact",
        tie="plus",
        divisor="count",
    )


# ---------------------------------------------------------------------------------------------
# Breadcrumbs


def keep_between(
    values: np.ndarray,
    density: float,
    gamma: float,
    *,
    conflict: Conflict,
    at_least_one: bool,
) -> np.ndarray:
    """Return the boolean mask of what Breadcrumbs keeps of a vector [n].

    The floor(gamma * n) largest magnitudes go; of what remains the floor(density * n) largest
    stay. If fewer remain than should stay, ``conflict="remove"`` keeps what there is and
    ``"keep"`` removes fewer outliers. ``at_least_one`` never leaves a nonempty vector empty:
    the smallest entry is never an outlier, and one entry stays however small the density.
    """
    n = len(values)
    removed = math.floor(gamma * n)
    stay = math.floor(density * n)
    if conflict == "keep":
        removed = min(removed, n - stay)
    if at_least_one and n > 0:
        stay = max(1, stay)
        removed = min(removed, n - 1)
    kept = np.zeros(n, bool)
    kept[_largest_first(values)[removed : removed + stay]] = True
    return kept


def breadcrumbs_mask(
    deltas: PerModel,
    density: float | Sequence[float],
    gamma: float | Sequence[float],
    scope: Scope,
    *,
    conflict: Conflict,
    at_least_one: bool,
) -> np.ndarray:
    """Return the boolean matrix [models, entries] of what Breadcrumbs keeps.

    A tensor of no dimension has no row: with ``scope="row"`` it is kept whole.
    """
    matrix = _flatten(deltas)
    mask = np.zeros(matrix.shape, bool)
    densities, gammas = _per_model(density, len(matrix)), _per_model(gamma, len(matrix))
    for i in range(len(matrix)):
        for block in blocks(deltas, scope):
            mask[i, block] = keep_between(
                matrix[i, block],
                densities[i],
                gammas[i],
                conflict=conflict,
                at_least_one=at_least_one,
            )
    if scope == "row":
        whole = {
            name: [np.full(np.shape(delta), np.ndim(delta) == 0) for delta in deltas[name]]
            for name in deltas
        }
        mask |= _flatten(whole).astype(bool)
    return mask


def breadcrumbs(
    deltas: PerModel,
    *,
    density: float | Sequence[float] = 0.2,
    gamma: float | Sequence[float] = 0.1,
    weights: Sequence[float] | None = None,
    scope: Scope = "row",
    conflict: Conflict = "remove",
    at_least_one: bool = False,
) -> Tensors:
    """Return sum_i w_i tau^_i, each task vector without its largest and its small entries.

    ``density`` is the kept share and ``gamma`` the share of outliers, each one number or one
    per model; ``weights`` one per model, all ones by default. The defaults are the paper's
    code (with lambda 0.4, see ``apply_to_base``); see ``keep_between`` for the other settings.
    """
    mask = breadcrumbs_mask(
        deltas, density, gamma, scope, conflict=conflict, at_least_one=at_least_one
    )
    trimmed = np.where(mask, _flatten(deltas), 0.0)
    return _unflatten(_weighted_sum(trimmed, _per_model(weights, len(trimmed))), deltas)


def breadcrumbs_mergekit(
    deltas: PerModel,
    *,
    density: float | Sequence[float],
    gamma: float | Sequence[float],
    weights: Sequence[float] | None = None,
) -> Tensors:
    """Return Breadcrumbs as mergekit 0.1.5 was observed to compute it: over whole tensors."""
    return breadcrumbs(
        deltas, density=density, gamma=gamma, weights=weights, scope="tensor", conflict="keep"
    )


def breadcrumbs_ties(
    deltas: PerModel,
    *,
    density: float | Sequence[float] = 0.2,
    gamma: float | Sequence[float] = 0.1,
    weights: Sequence[float] | None = None,
    scope: Scope = "row",
    conflict: Conflict = "remove",
    at_least_one: bool = False,
    sign: Sign = "mass",
    election: Election = "weighted",
    tie: Tie = "plus",
    divisor: Divisor = "none",
    zero_divisor: ZeroDivisor = "zero",
) -> Tensors:
    """Return the merge that trims as ``breadcrumbs`` and then elects and merges as ``ties``."""
    mask = breadcrumbs_mask(
        deltas, density, gamma, scope, conflict=conflict, at_least_one=at_least_one
    )
    trimmed = np.where(mask, _flatten(deltas), 0.0)
    w = _per_model(weights, len(trimmed))
    elected = elect(trimmed, w, sign=sign, election=election, tie=tie)
    merged = merge_agreeing(
        trimmed, w, elected, election=election, divisor=divisor, zero_divisor=zero_divisor
    )
    return _unflatten(merged, deltas)


def breadcrumbs_ties_mergekit(
    deltas: PerModel,
    *,
    density: float | Sequence[float],
    gamma: float | Sequence[float],
    weights: Sequence[float] | None = None,
    normalize: bool = False,
) -> Tensors:
    """Return ``breadcrumbs_ties`` as mergekit 0.1.5 was observed to compute it."""
    return breadcrumbs_ties(
        deltas,
        density=density,
        gamma=gamma,
        weights=weights,
        scope="tensor",
        conflict="keep",
        divisor="weights" if normalize else "none",
        zero_divisor="one",
    )
