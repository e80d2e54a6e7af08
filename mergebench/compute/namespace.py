"""Which array library an array belongs to, and the way out of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergebench.core.tensor import Array


def namespace(stack: Any) -> Any:
    """The array API namespace of ``stack``; numpy itself for numpy arrays.

    numpy ≥ 2 follows the standard, so that the compatibility package is imported for others only.
    """
    if isinstance(stack, np.ndarray):
        return np
    from array_api_compat import array_namespace

    return array_namespace(stack)


def as_numpy(stack: Any) -> Array:
    """A host numpy view or copy of an array of any library, cut off from autograd."""
    if hasattr(stack, "detach"):
        stack = stack.detach().cpu()
        # numpy has no bfloat16 of its own; float32 holds its numbers as they are.
        stack = stack.float() if stack.dtype.itemsize < 4 else stack
    array = np.asarray(stack)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array
