"""Giving what is left of a task vector the norm of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mergebench.compute.namespace import namespace
from mergebench.compute.sums import totals


def norm_ratios(sweep: Any, change: Callable[[Any, Any], Any]) -> Any:
    """``‖x‖₁ / ‖change(x)‖₁`` of every model over a sweep; 1 where nothing is left.

    Parameters
    ----------
    sweep : Sweep
    change : callable
        ``(stack, at) -> stack``.

    Returns
    -------
    float64 array, (models,)
    """

    def terms(stack: Any, at: Any) -> Any:
        xp = namespace(stack)
        return xp.concat([xp.abs(stack), xp.abs(change(stack, at))], axis=0)

    sums = totals(sweep, terms, 2 * sweep.models)
    xp = namespace(sums)
    before, after = sums[: sweep.models], sums[sweep.models :]
    empty = xp.astype(after == 0, sums.dtype)
    return (before * (1 - empty) + empty) / (after + empty)


def rescaled(stack: Any, ratios: Any) -> Any:
    """Each model times its ratio; in the dtype of the stack, (n, m)."""
    return stack * namespace(stack).astype(ratios, stack.dtype)[:, None]
