"""What stages do to a stretch of float32 rows, for the compiled passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.compute.jit import float_kernel
from mergebench.merge.kernels.codes import (
    ADD,
    DISJOINT,
    DIVIDE,
    DRAW,
    ELECT,
    MULTIPLY,
    NONE,
    STEP,
    WEIGHTS,
    WINDOW,
)

_0, _1 = np.float32(0), np.float32(1)
_PHI = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


@float_kernel
def _keep(x: Any, above: Any, not_above: Any, start: Any, stop: Any) -> None:
    """Zero what is not above the one number, and what is above the other."""
    # A range from zero on: a compiler that must think of negative places does not vectorise.
    part = x[start:stop]
    for j in range(len(part)):
        size = abs(part[j])
        part[j] = part[j] * (_1 if (size > above) & (size <= not_above) else _0)


@float_kernel
def _window(x: Any, bounds: Any, ties: Any, first: Any, count: Any) -> None:
    """The window of one model: two thresholds, each with the entry up to which its ties belong.

    ``bounds`` has what magnitudes must be above where ties stay and where they do not, and the
    same for what is dropped.
    """
    keep = min(max(ties[0] - first, 0), count)
    drop = min(max(ties[1] - first, 0), count)
    one, two = min(keep, drop), max(keep, drop)
    _keep(x, bounds[0], bounds[2], 0, one)
    if keep > drop:
        _keep(x, bounds[0], bounds[3], one, two)
    else:
        _keep(x, bounds[1], bounds[2], one, two)
    _keep(x, bounds[1], bounds[3], two, count)


@float_kernel
def _numbers(stream: Any, first: Any, count: Any, out: Any) -> None:
    """Words ``first`` and on of a stream, as in :mod:`mergebench.compute.random`."""
    start = stream + np.uint64(first + 1) * _PHI
    for j in range(count):
        z = start + np.uint64(j) * _PHI
        z = (z ^ (z >> _S30)) * _M1
        z = (z ^ (z >> _S27)) * _M2
        out[j] = z ^ (z >> _S31)


@float_kernel
def _chosen(x: Any, numbers: Any, last: Any, count: Any) -> None:
    for j in range(count):
        x[j] = x[j] * (_1 if numbers[j] <= last else _0)


@float_kernel
def _times(x: Any, by: Any, count: Any) -> None:
    for j in range(count):
        x[j] = x[j] * by


@float_kernel
def _over(x: Any, by: Any, count: Any) -> None:
    for j in range(count):
        x[j] = x[j] / by


@float_kernel
def _sign(value: Any) -> Any:
    return (_1 if value > _0 else _0) - (_1 if value < _0 else _0)


@float_kernel
def total_votes(X: Any, rows: Any, total: Any, weights: Any, how: Any, count: Any) -> None:
    """The sum that decides on a sign; ``how`` has 1 for weights and 2 for signs."""
    for i in range(rows):
        x, w = X[i], weights[i] if how & 1 else _1
        if how & 2:
            if i == 0:
                for j in range(count):
                    total[j] = _sign(x[j] * w)
            else:
                for j in range(count):
                    total[j] = total[j] + _sign(x[j] * w)
        elif i == 0:
            for j in range(count):
                total[j] = x[j] * w
        else:
            for j in range(count):
                total[j] = total[j] + x[j] * w


@float_kernel
def _elect(X: Any, rows: Any, total: Any, weights: Any, how: Any, tie: Any, count: Any) -> None:
    """Zero what has not the sign of the sum."""
    total_votes(X, rows, total, weights, how, count)
    for i in range(rows):
        x, w = X[i], weights[i] if how & 1 else _1
        if tie > 0:
            for j in range(count):
                v = x[j] * w
                agrees = ((v > _0) & (not total[j] < _0)) | ((v < _0) & (total[j] < _0))
                x[j] = x[j] * (_1 if agrees else _0)
        elif tie < 0:
            for j in range(count):
                v = x[j] * w
                agrees = ((v > _0) & (total[j] > _0)) | ((v < _0) & (not total[j] > _0))
                x[j] = x[j] * (_1 if agrees else _0)
        else:
            for j in range(count):
                v = x[j] * w
                agrees = ((v > _0) & (total[j] > _0)) | ((v < _0) & (total[j] < _0))
                x[j] = x[j] * (_1 if agrees else _0)


@float_kernel
def _add(X: Any, rows: Any, weights: Any, count: Any) -> None:
    total, w = X[0], weights[0]
    if rows == 1:
        _times(total, w, count)
    for i in range(1, rows):
        x, v = X[i], weights[i]
        if i == 1:
            for j in range(count):
                total[j] = total[j] * w + x[j] * v
        else:
            for j in range(count):
                total[j] = total[j] + x[j] * v


@float_kernel
def _step(X: Any, own: Any, shares: Any, step: Any, exact: Any, count: Any) -> None:
    """``own`` has the pivot, how many others there are, and which."""
    start = X[own[0]]
    for place in range(own[1]):
        x, share = X[own[2 + place]], shares[place]
        if place == 0:
            for j in range(count):
                step[j] = (x[j] - start[j]) * share
        else:
            for j in range(count):
                step[j] = step[j] + (x[j] - start[j]) * share
    out = X[0]
    if own[1] == 0:
        for j in range(count):
            out[j] = start[j]
    elif exact:
        for j in range(count):
            out[j] = start[j] if step[j] == _0 else start[j] + step[j]
    else:
        for j in range(count):
            out[j] = start[j] + step[j]


@float_kernel
def _disjoint(
    X: Any, rows: Any, weights: Any, divisor: Any, zero: Any, total: Any, behind: Any, count: Any
) -> None:
    for i in range(rows):
        x, w = X[i], weights[i]
        # A product, as the op has it: a negative weight leaves a negative zero.
        here, nowhere = (w, w * _0) if divisor == WEIGHTS else (_1, _0)
        if i == 0:
            for j in range(count):
                total[j] = x[j] * w
            for j in range(count):
                behind[j] = here if x[j] != _0 else nowhere
        else:
            for j in range(count):
                total[j] = total[j] + x[j] * w
            for j in range(count):
                behind[j] = behind[j] + (here if x[j] != _0 else nowhere)
    out = X[0]
    if divisor == NONE:
        for j in range(count):
            out[j] = total[j]
    else:
        for j in range(count):
            out[j] = total[j] / (behind[j] + (_1 if behind[j] == _0 else _0))
        if divisor == WEIGHTS and zero:
            for j in range(count):
                out[j] = out[j] * (_0 if behind[j] == _0 else _1)


@float_kernel
def staged(
    codes: Any,
    ints: Any,
    floats: Any,
    bounds: Any,
    X: Any,
    rows: Any,
    here: Any,
    m: Any,
    numbers: Any,
    draws: Any,
    start: Any,
    stop: Any,
) -> Any:
    """Run stages ``start:stop`` on the first ``rows`` rows; how many are left.

    The others are those of :func:`combine`, for ``m`` entries of the tensor from ``here`` on.
    """
    one, two = X[X.shape[0] - 2], X[X.shape[0] - 1]
    for stage in range(start, stop):
        code, a, b = codes[stage, 0], codes[stage, 1], codes[stage, 2]
        own = floats[stage]
        if code == WINDOW:
            for i in range(rows):
                _window(X[i], bounds[stage, i], ints[stage, i], here, m)
        elif code == DRAW:
            word = here // 2
            for i in range(rows):
                stream, most = np.uint64(ints[stage, i, 0]), np.uint32(ints[stage, i, 1])
                _numbers(stream, word, (here + m + 1) // 2 - word, numbers)
                _chosen(X[i], draws[here - 2 * word :], most, m)
        elif code == MULTIPLY:
            for i in range(rows):
                _times(X[i], own[i], m)
        elif code == DIVIDE:
            for i in range(rows):
                _over(X[i], own[i], m)
        elif code == ELECT:
            _elect(X, rows, one, own, a, b, m)
        elif code == ADD:
            _add(X, rows, own, m)
            rows = 1
        elif code == STEP:
            _step(X, ints[stage, :, 0], own, one, a, m)
            rows = 1
        elif code == DISJOINT:
            _disjoint(X, rows, own, a, b, one, two, m)
            rows = 1
    return rows
