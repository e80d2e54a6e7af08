"""Zeroing entries by a mask, and moving them without touching what stays."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.compute.namespace import namespace


def silence(stack: Any, mask: Any) -> Any:
    """``stack`` where ``mask`` is true and zero elsewhere, same shape and dtype.

    A product rather than a selection: ten times faster in numpy. Finite entries are assumed;
    a silenced negative entry becomes a negative zero, which equals zero.
    """
    return stack * namespace(stack).astype(mask, stack.dtype)


def moved(start: Any, step: Any) -> Any:
    """``start + step``, and the very bits of ``start`` where ``step`` is zero.

    A plain sum would turn a negative zero into a positive one.
    """
    xp = namespace(start)
    with np.errstate(over="ignore"):
        total = start + step
    if not isinstance(start, np.ndarray):
        return xp.where(step == 0, start, total)
    # Negative zeros are rare, and looking for them costs less than a selection.
    negative_zero = np.signbit(start) & (start == 0)
    if negative_zero.any():
        np.copyto(total, start, where=negative_zero & (step == 0))
    return total
