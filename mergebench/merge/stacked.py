"""Factors of a weighted sum of low-rank updates, side by side in the dtype that is written."""

from __future__ import annotations

from math import frexp, isfinite, prod

import numpy as np

from mergebench.compute.rounding import round_to
from mergebench.core.delta import LowRank
from mergebench.core.tensor import DTYPES, Array, Tensor
from mergebench.merge.chains import coefficients
from mergebench.merge.item import Item, nonfinite
from mergebench.merge.op import Chain

_BF16 = DTYPES["BF16"]
#: All bits of a bfloat16's exponent, twice: infinite or not a number.
_EXPONENT = 0x7F80


def stacked(ops: Chain, item: Item, rank: int, dtype: str, name: str) -> tuple[Array, Array]:
    """``[c₁s₁B₁ …]`` and ``[A₁; …]``, with zeros up to ``rank``: nothing is lost but digits.

    Parameters
    ----------
    ops : Chain
        A linear one.
    item : Item
        Its displacements are low-rank.
    rank : int
        At least the sum of their ranks.
    dtype : str
        Of the result: a floating key of :data:`~mergebench.core.tensor.DTYPES`. Factors that are
        stored in it are copied, not computed with, unless they must be multiplied.
    name : str
        For errors.

    Returns
    -------
    arrays of ``dtype``, (out, rank) and (rank, in)

    Raises
    ------
    MergebenchError
        If a factor is not finite, or its multiple does not fit the dtype.
    """
    low = [(c, d) for c, d in zip(_shares(ops, item), item.deltas, strict=True) if d is not None]
    pairs = [(share * d.scale, d) for share, d in low if isinstance(d, LowRank)]
    rows, columns = pairs[0][1].B.shape[0], prod(pairs[0][1].A.shape[1:])
    left, right = np.empty((rows, rank), DTYPES[dtype]), np.empty((rank, columns), DTYPES[dtype])
    at = 0
    for factor, delta in pairs:
        end = at + delta.rank
        left[:, at:end] = _part(item, delta.B, factor, dtype, name).reshape(rows, -1)
        right[at:end] = _part(item, delta.A, 1.0, dtype, name).reshape(-1, columns)
        at = end
    left[:, at:], right[at:] = 0, 0
    return left, right


def _shares(ops: Chain, item: Item) -> list[float]:
    return [float(c) for c in coefficients(ops, item.site, item.weights, item.places)]


def _part(item: Item, tensor: Tensor, factor: float, dtype: str, name: str) -> Array:
    """``factor`` times a stored factor, in ``dtype``."""
    stored = tensor.read(0, prod(tensor.shape))
    if not _finite(stored):
        raise nonfinite(item)
    if tensor.dtype == dtype:
        if factor == 1:
            return stored
        if (shifted := _shifted(stored, factor)) is not None:
            return shifted
    return round_to(stored.astype(np.float64) * factor, dtype, name)


def _finite(values: Array) -> bool:
    if values.dtype == _BF16:
        bits = values.view(np.uint16) & _EXPONENT
        return bool(bits.max(initial=0) != _EXPONENT)
    return bool(np.isfinite(values).all())


def _shifted(values: Array, factor: float) -> Array | None:
    """bfloat16 values times a power of two, which moves their exponents; None where it rounds."""
    if values.dtype != _BF16 or not isfinite(factor) or abs(frexp(factor)[0]) != 0.5:
        return None
    if not 2.0**-100 < abs(factor) < 2.0**100:
        return None
    # By way of float32, whose upper half a bfloat16 is.
    wide = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        wide *= np.float32(factor)
    bits = wide.view(np.uint32)
    if (bits & 0xFFFF).any() or (bits & (_EXPONENT << 16)).max(initial=0) == _EXPONENT << 16:
        return None
    return (bits >> 16).astype(np.uint16).view(_BF16)
