"""Rounding to stored dtypes, once."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np

from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import DTYPES, Array


def add_base(delta: Array, base: Array) -> Array:
    """``base + delta``, and the very bits of the base where ``delta`` is zero.

    A plain sum would turn a negative zero of the base into a positive one.
    """
    total = base + delta
    negative_zero = np.signbit(base) & (base == 0)
    if negative_zero.any():
        np.copyto(total, base, where=negative_zero & (delta == 0))
    return total


def round_to(values: Array, dtype: str, name: str) -> Array:
    """``values`` in a stored dtype, rounded to nearest even; shape kept.

    Parameters
    ----------
    values : array of float32 or float64, finite
    dtype : str
        A floating key of :data:`~mergebench.core.tensor.DTYPES`.
    name : str
        The tensor's name, for the error.

    Raises
    ------
    MergebenchError
        If a finite value is too large for the dtype, naming the tensor.
    """
    target: np.dtype[Any] = DTYPES[dtype]
    if values.dtype == target:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(target)
    if target.itemsize < values.dtype.itemsize and _may_overflow(values, target):
        wide = rounded.astype(np.float64)
        bad = int(np.count_nonzero(~np.isfinite(wide) & np.isfinite(values)))
        if bad:
            largest = float(np.abs(values).max())
            raise MergebenchError(
                f"{name}: {bad} values do not fit {dtype.lower()}, the largest is {largest:g}",
                fix="use --dtype bf16 or f32",
            )
    return rounded


def _may_overflow(values: Array, target: np.dtype[Any]) -> bool:
    """False only if no value can overflow; one pass without temporaries for wide ranges."""
    flat = values.reshape(-1)
    square = float(np.dot(flat, flat))
    limit = {"bfloat16": 1e38, "float32": 1e38, "float16": 6e4}.get(target.name, 200.0)
    return not isfinite(square) or square > limit**2
