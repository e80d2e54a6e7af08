"""Rounding to stored dtypes, once."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np

from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import DTYPES, Array


def round_to(values: Array, dtype: str, name: str) -> Array:
    """``values`` in a stored dtype, rounded to nearest even; shape kept.

    Parameters
    ----------
    values : array of float32 or float64
    dtype : str
        A floating key of :data:`~mergebench.core.tensor.DTYPES`.
    name : str
        The tensor's name, for the error.

    Raises
    ------
    MergebenchError
        If a value is too large for the dtype, or was for the arithmetic, naming the tensor.
    """
    target: np.dtype[Any] = DTYPES[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values if values.dtype == target else _to_odd(values, target).astype(target)
        suspect = _may_overflow(values, target)
    if suspect and (bad := int(np.count_nonzero(~np.isfinite(rounded.astype(np.float64))))):
        largest = float(np.abs(values).max())
        raise MergebenchError(
            f"{name}: {bad} values do not fit {dtype.lower()}, the largest is {largest:g}",
            fix="use --dtype bf16 or f32"
            if np.isfinite(largest)
            else "scale the task vectors down, or store the inputs in float64",
        )
    return rounded


def _to_odd(values: Array, target: np.dtype[Any]) -> Array:
    """float64 on its way to bf16 or fp8: float32, rounded to odd, so that it is rounded once.

    These casts go by way of float32, where a value just above a midpoint would fall onto it.
    """
    if values.dtype.itemsize < 8 or target.isbuiltin == 1:
        return values
    near = values.astype(np.float32)
    raw = near.view(np.uint32)
    raw -= (np.abs(near) > np.abs(values)) & np.isfinite(values)
    raw |= (near.astype(np.float64) != values) & np.isfinite(near)
    return near


def _may_overflow(values: Array, target: np.dtype[Any]) -> bool:
    """False only if no value can overflow; one pass without temporaries for wide ranges."""
    flat = values.reshape(-1)
    square = float(np.dot(flat, flat))
    wide = {"bfloat16": 1e38, "float32": 1e38, "float64": 1e150, "float16": 6e4}
    limit = wide.get(target.name, 200.0)
    return not isfinite(square) or square > limit**2
