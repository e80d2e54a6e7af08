"""Half reset and adapter averaging in plain Python; nothing here imports the package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracle.drawn import WORD, digest


def permutation(count: int, *parts: int) -> list[int]:
    """Places by the random words of a stream, with Python's integers."""
    stream = digest(",".join(map(str, parts)))
    found = []
    for index in range(count):
        word = (stream + (index + 1) * 0x9E3779B97F4A7C15) & WORD
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
        found.append((word ^ (word >> 31), index))
    return [index for _, index in sorted(found)]


def reset_modules(
    blocks: Sequence[Sequence[str]], stack: str, category: str, seed: int
) -> set[str]:
    """Of the modules of one category, listed block by block, those that go back to the base."""
    keys = seed, digest(stack), digest(category)
    more = set(permutation(len(blocks), *keys)[: len(blocks) // 2])
    reset = set()
    for block, modules in enumerate(blocks):
        names = sorted(modules, key=str.encode)
        count = len(names) // 2 + (len(names) % 2 and block in more)
        reset |= {names[place] for place in permutation(len(names), *keys, block)[:count]}
    return reset


def blended(taus: Sequence[np.ndarray], m: float) -> np.ndarray:
    """(1 - m) of the last one and m of the mean of all others, in float64."""
    *earlier, last = (np.asarray(tau, np.float64) for tau in taus)
    return (1 - m) * last + m * np.mean(earlier, axis=0) if earlier else last
