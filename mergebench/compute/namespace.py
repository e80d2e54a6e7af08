"""Which array library an array belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np


def namespace(stack: Any) -> Any:
    """The array API namespace of ``stack``; numpy itself for numpy arrays.

    numpy ≥ 2 follows the standard, so that the compatibility package is imported for others only.
    """
    if isinstance(stack, np.ndarray):
        return np
    from array_api_compat import array_namespace

    return array_namespace(stack)
