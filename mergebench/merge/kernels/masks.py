"""Zeroing what is not to stay, for the compiled passes: by thresholds, and at random."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.compute.jit import inner

_0, _1 = np.float32(0), np.float32(1)
_PHI = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


@inner
def _keep(x: Any, above: Any, not_above: Any, start: Any, stop: Any) -> None:
    """Zero what is not above the one number, and what is above the other."""
    # A range from zero on: a compiler that must think of negative places does not vectorise.
    part = x[start:stop]
    for j in range(len(part)):
        size = abs(part[j])
        part[j] = part[j] * (_1 if (size > above) & (size <= not_above) else _0)


@inner
def window(
    x: Any, least: Any, least_late: Any, most: Any, most_late: Any, keep: Any, drop: Any, count: Any
) -> None:
    """The window of one model: two thresholds, each with the place from which its ties do not stay.

    Magnitudes must be above ``least`` before ``keep`` and above ``least_late`` from there on, and
    not above ``most`` before ``drop`` and ``most_late`` from there on.
    """
    one, two = min(keep, drop), max(keep, drop)
    _keep(x, least, most, np.int64(0), one)
    if keep > drop:
        _keep(x, least, most_late, one, two)
    else:
        _keep(x, least_late, most, one, two)
    _keep(x, least_late, most_late, two, count)


@inner
def random_words(stream: Any, first: Any, count: Any, out: Any) -> None:
    """Words ``first`` and on of a stream, as in :mod:`mergebench.compute.random`."""
    start = stream + np.uint64(first + 1) * _PHI
    for j in range(count):
        z = start + np.uint64(j) * _PHI
        z = (z ^ (z >> _S30)) * _M1
        z = (z ^ (z >> _S27)) * _M2
        out[j] = z ^ (z >> _S31)


@inner
def chosen(x: Any, numbers: Any, last: Any, count: Any) -> None:
    """Zero entries whose number is above the last that is chosen."""
    for j in range(count):
        x[j] = x[j] * (_1 if numbers[j] <= last else _0)
