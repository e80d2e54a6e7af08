"""Signs that models elect, and means of what agrees with them, for the compiled passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.compute.jit import inner
from mergebench.merge.kernels.codes import NONE, WEIGHTS

_0, _1 = np.float32(0), np.float32(1)


@inner
def _sign(value: Any) -> Any:
    return (_1 if value > _0 else _0) - (_1 if value < _0 else _0)


@inner
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


@inner
def elected_signs(
    X: Any, rows: Any, total: Any, weights: Any, how: Any, tie: Any, count: Any
) -> None:
    """The sign that is elected: 1, -1, or 0 for none."""
    total_votes(X, rows, total, weights, how, count)
    if tie > 0:
        for j in range(count):
            total[j] = -_1 if total[j] < _0 else _1
    elif tie < 0:
        for j in range(count):
            total[j] = _1 if total[j] > _0 else -_1
    else:
        for j in range(count):
            total[j] = _sign(total[j])


@inner
def _agreeing(value: Any, weight: Any, sign: Any) -> Any:
    """A value if its vote has the sign, else a zero."""
    return value * (_1 if value * weight * sign > _0 else _0)


@inner
def elect(X: Any, rows: Any, total: Any, weights: Any, how: Any, tie: Any, count: Any) -> None:
    """Zero what has not the sign of the sum."""
    elected_signs(X, rows, total, weights, how, tie, count)
    for i in range(rows):
        x, w = X[i], weights[i] if how & 1 else _1
        for j in range(count):
            x[j] = _agreeing(x[j], w, total[j])


@inner
def _divided(out: Any, behind: Any, divisor: Any, zero: Any, count: Any) -> None:
    if divisor != NONE:
        for j in range(count):
            out[j] = out[j] / (behind[j] + (_1 if behind[j] == _0 else _0))
        if divisor == WEIGHTS and zero:
            for j in range(count):
                out[j] = out[j] * (_0 if behind[j] == _0 else _1)


# Loops stand alone where they write two rows: within others they are not vectorised.
@inner
def _shared_first(x: Any, behind: Any, w: Any, here: Any, nowhere: Any, count: Any) -> None:
    for j in range(count):
        behind[j] = here if x[j] != _0 else nowhere
        x[j] = x[j] * w


@inner
def _shared(x: Any, total: Any, behind: Any, w: Any, here: Any, nowhere: Any, count: Any) -> None:
    for j in range(count):
        behind[j] = behind[j] + (here if x[j] != _0 else nowhere)
        total[j] = total[j] + x[j] * w


@inner
def _agreed_first(
    x: Any, behind: Any, signs: Any, v: Any, w: Any, here: Any, nowhere: Any, count: Any
) -> None:
    for j in range(count):
        kept = _agreeing(x[j], v, signs[j])
        behind[j] = here if kept != _0 else nowhere
        x[j] = kept * w


@inner
def _agreed(
    x: Any, total: Any, behind: Any, signs: Any, v: Any, w: Any, here: Any, nowhere: Any, count: Any
) -> None:
    for j in range(count):
        kept = _agreeing(x[j], v, signs[j])
        behind[j] = behind[j] + (here if kept != _0 else nowhere)
        total[j] = total[j] + kept * w


@inner
def disjoint(
    X: Any, rows: Any, votes: Any, how: Any, signs: Any, elected: Any, weights: Any, divisor: Any,
    zero: Any, behind: Any, count: Any,
) -> None:  # fmt: skip
    """The mean of what is not zero; where a sign is ``elected``, of what agrees with it."""
    for i in range(rows):
        x, total, w, v = X[i], X[0], weights[i], votes[i] if how & 1 else _1
        # A product, as the op has it: a negative weight leaves a negative zero.
        here, nowhere = (w, w * _0) if divisor == WEIGHTS else (_1, _0)
        if elected and i == 0:
            _agreed_first(x, behind, signs, v, w, here, nowhere, count)
        elif elected:
            _agreed(x, total, behind, signs, v, w, here, nowhere, count)
        elif i == 0:
            _shared_first(x, behind, w, here, nowhere, count)
        else:
            _shared(x, total, behind, w, here, nowhere, count)
    _divided(X[0], behind, divisor, zero, count)
