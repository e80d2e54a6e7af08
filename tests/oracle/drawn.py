"""Random, depth-scaled and consensus merges written out in float64, to test the package against.

As in :mod:`tests.oracle.methods`, nothing imports the package; ``deltas[name]`` is a list with one
task vector per model. Random numbers are drawn one by one with Python's integers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from tests.oracle.methods import PerModel, Tensors

WORD = (1 << 64) - 1
#: ``(name, model, flat task vector, row length) -> (kept, probability)`` per entry.
Rule = Callable[[str, int, np.ndarray, int], tuple[list[bool], list[float]]]


def digest(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def share(seed: int, name: str, key: int, index: int) -> float:
    """The number in [0, 1) of one entry of tensor ``name`` of the model that ``key`` names."""
    stream = digest(f"{seed},{digest(name)},{key}")
    word = (stream + (index // 2 + 1) * 0x9E3779B97F4A7C15) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    word ^= word >> 31
    return ((word >> 32) if index % 2 else (word & 0xFFFFFFFF)) / 2**32


def uniform_rule(density: float, seed: int, keys: Sequence[int]) -> Rule:
    """DARE: every entry stays with probability ``density``."""

    def rule(name: str, model: int, tau: np.ndarray, row: int) -> tuple[list[bool], list[float]]:
        numbers = [share(seed, name, keys[model], j) for j in range(len(tau))]
        return [number < density for number in numbers], [density] * len(tau)

    return rule


def ranked_rule(density: float, epsilon: float, seed: int, keys: Sequence[int]) -> Rule:
    """DELLA: rank r of a row of n stays with probability ρ - ε + (r - 1)/(n - 1) 2ε."""

    def rule(name: str, model: int, tau: np.ndarray, row: int) -> tuple[list[bool], list[float]]:
        chances = [density] * len(tau)
        for first in range(0, len(tau), max(row, 1)):
            places = range(first, first + row)
            # From the smallest; of equals the later one first.
            for rank, place in enumerate(sorted(places, key=lambda j: (abs(tau[j]), -j)), 1):
                if row > 1 and density < 1:
                    chances[place] = density - epsilon + (rank - 1) / (row - 1) * 2 * epsilon
        numbers = [share(seed, name, keys[model], j) for j in range(len(tau))]
        return [n < p for n, p in zip(numbers, chances, strict=True)], chances

    return rule


def thinned(deltas: PerModel, rule: Rule, rescale: str) -> dict[str, list[np.ndarray]]:
    """Task vectors with what a rule keeps, rescaled: by its probability, by ``l1``, or not."""
    found: dict[str, list[np.ndarray]] = {}
    for name, each in deltas.items():
        found[name] = []
        for model, delta in enumerate(each):
            tau = np.asarray(delta, np.float64).ravel()
            row = np.shape(delta)[-1] if np.ndim(delta) else 1
            kept, chances = rule(name, model, tau, row)
            left = np.where(kept, tau, 0.0)
            if rescale in ("density", "probability"):
                left = left / np.array(chances)
            elif rescale == "l1" and np.any(left):
                left = left * (np.abs(tau).sum() / np.abs(left).sum())
            found[name].append(left.reshape(np.shape(delta)))
    return found


def depths(names: Sequence[str]) -> dict[str, float | None]:
    """The depth l / (L - 1) of a tensor in block ``….layers.l.…``; ``None`` outside of blocks."""
    places = {name: re.match(r"(.*layers)\.(\d+)\.", name) for name in names}
    found: dict[str, float | None] = {}
    for name, place in places.items():
        if place is None:
            found[name] = None
            continue
        indices = [int(m[2]) for m in places.values() if m and m[1] == place[1]]
        last = max(indices)
        found[name] = int(place[2]) / last if last else 1.0
    return found


def l1(tensors: Sequence[np.ndarray]) -> float:
    """The L1 norm of tensors laid end to end."""
    return float(sum(np.abs(np.asarray(each, np.float64)).sum() for each in tensors))


def lines(deltas: PerModel, merged: Tensors, beta: float, alpha: float | None) -> Tensors:
    """A merged task vector scaled by α + β · depth, α by norms where it is ``None``."""
    if alpha is None:
        count = len(next(iter(deltas.values())))
        sums = [np.sum(np.asarray(each, np.float64), axis=0) for each in deltas.values()]
        whole = l1(list(merged.values()))
        alpha = l1(sums) / whole / count if whole else 0.0
    depth = depths(list(merged))
    return {name: (alpha + beta * (depth[name] or 0.0)) * each for name, each in merged.items()}


def consensus(deltas: PerModel, merged: Tensors, k: int, mask_lam: float) -> Tensors:
    """A merged task vector where at least ``k`` TALL masks are set, zero elsewhere."""
    found: Tensors = {}
    for name, whole in merged.items():
        uses = np.zeros(np.shape(whole), int)
        for delta in deltas[name]:
            tau = np.asarray(delta, np.float64)
            uses += np.abs(tau) > mask_lam * np.abs(whole - tau)
        found[name] = np.where(uses >= k, whole, 0.0)
    return found
