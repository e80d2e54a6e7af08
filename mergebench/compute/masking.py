"""Zeroing entries by a mask."""

from __future__ import annotations

from typing import Any

from mergebench.compute.namespace import namespace


def silence(stack: Any, mask: Any) -> Any:
    """``stack`` where ``mask`` is true and zero elsewhere, same shape and dtype.

    A product rather than a selection: ten times faster in numpy. Finite entries are assumed;
    a silenced negative entry becomes a negative zero, which equals zero.
    """
    return stack * namespace(stack).astype(mask, stack.dtype)
