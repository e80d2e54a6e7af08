"""Keep the entries that change a row's distribution most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
from annotated_types import Ge

from mergebench.compute.masking import silence
from mergebench.compute.namespace import as_numpy, namespace
from mergebench.compute.select import kth_magnitudes
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.op import op

R = TypeVar("R")
#: Importances that are kept to be sorted; of more, thresholds are searched.
_GATHERED = 1 << 21


def importance(stack: Stack, at: At) -> Stack:
    """``|x| · KL(softmax(base + x) ‖ softmax(base))`` of every entry, by row, float64.

    Parameters
    ----------
    stack : array, (n, rows · row)
    at : At
        With the base's entries. A row is the last dimension; a vector is one row.
    """
    if stack.shape[1] == 0:
        return stack
    xp = namespace(stack)
    lines = xp.astype(xp.reshape(stack, (stack.shape[0], -1, at.site.row)), xp.float64)
    base = xp.astype(xp.reshape(at.base, (1, -1, at.site.row)), xp.float64)
    before, after = _softmax(base), _softmax(base + lines)
    divergence = xp.sum(after * lines, axis=-1, keepdims=True) - _growth(base, lines, before)
    divergence = xp.where(divergence > 0, divergence, 0.0)
    return xp.reshape(xp.abs(lines) * divergence, stack.shape)


def _growth(base: Any, lines: Any, before: Any) -> Any:
    """``log Σ exp(base + x) - log Σ exp(base)`` by row, precise where x is small."""
    xp = namespace(lines)
    small = xp.max(xp.abs(lines), axis=-1, keepdims=True) < 1
    near = xp.sum(before * xp.expm1(xp.where(small, lines, 0.0)), axis=-1, keepdims=True)
    return xp.where(small, xp.log1p(near), _logsumexp(base + lines) - _logsumexp(base))


def _logsumexp(lines: Any) -> Any:
    xp = namespace(lines)
    top = xp.max(lines, axis=-1, keepdims=True)
    return top + xp.log(xp.sum(xp.exp(lines - top), axis=-1, keepdims=True))


def _softmax(lines: Any) -> Any:
    xp = namespace(lines)
    raised = xp.exp(lines - xp.max(lines, axis=-1, keepdims=True))
    return raised / xp.sum(raised, axis=-1, keepdims=True)


@dataclass(frozen=True)
class _Importances:
    """A sweep over importances instead of entries."""

    sweep: Sweep

    @property
    def models(self) -> int:
        return self.sweep.models

    @property
    def size(self) -> int:
        return self.sweep.size

    def __call__(self, visit: Callable[[Stack, At], R]) -> Iterator[tuple[At, R]]:
        return self.sweep(lambda stack, at: visit(importance(stack, at), at))

    def sample(self, count: int) -> Stack:
        # Importances need the base beside the entries, which only a whole sweep has.
        step = max(self.size // count, 1)
        found = self(lambda stack, at: np.array(as_numpy(stack)[:, :: min(step, stack.shape[1])]))
        return np.concatenate([part for _, part in found], axis=1)


def _measure(sweep: Sweep, iqr: float) -> Any:
    """The least importance that stays, per model, (n,) in float64."""
    size = sweep.size
    if size == 0:
        return np.zeros(sweep.models)
    # The quantile q is the entry at ⌊q (d - 1)⌋, counted upwards from 0.
    places = [int(share * (size - 1)) for share in (0.25, 0.5, 0.75)]
    low, middle, high = _ordered(_Importances(sweep), places)
    return middle + iqr * (high - low)


def _ordered(found: _Importances, places: list[int]) -> list[Any]:
    """The importances at some places in rising order, (n,) each."""
    if found.size * found.models <= _GATHERED:
        parts = [part for _, part in found(lambda stack, at: stack)]
        xp = namespace(parts[0])
        whole = xp.sort(xp.concat(parts, axis=1), axis=1)
        return [whole[:, place] for place in places]
    cuts = kth_magnitudes(found, [[found.size - place for place in places]] * found.models)
    return [np.array([row[index].value for row in cuts]) for index in range(len(places))]


@op(
    granularity="row",
    statistic=lambda iqr: Statistic("tensor", partial(_measure, iqr=iqr)),
    needs_base=True,
)
def keep_important(stack: Stack, at: At, iqr: Annotated[float, Ge(0)] = 1.5) -> Stack:
    """Zero the entries whose importance is below ``median + iqr · (Q3 - Q1)`` of their tensor.

    The importance of an entry is its magnitude times the divergence of its row,
    ``|x| · KL(softmax(base + x) ‖ softmax(base))``; quartiles are entries, ``⌊q (d - 1)⌋`` in
    rising order.

    Parameters
    ----------
    iqr : float >= 0
        How many interquartile ranges above the median.
    """
    limits = at.value
    if isinstance(limits, np.ndarray):
        limits = namespace(stack).asarray(limits, device=stack.device)
    return silence(stack, importance(stack, at) >= limits[:, None])
