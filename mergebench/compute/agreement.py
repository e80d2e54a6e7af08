"""TIES on coordinates of task vectors in a basis whose signs are a convention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mergebench.compute.keep import row_ranks_mask
from mergebench.compute.masking import silence
from mergebench.compute.matrices import sum_rows
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import RANK

Divisor = Literal["count", "none"]


def agreed(
    coordinates: Any, weights: Sequence[float], density: float, divisor: Divisor = "count"
) -> Any:
    """Trim, elect a sign per coordinate, combine what agrees.

    Parameters
    ----------
    coordinates : array, (n, d)
        Of n task vectors. Those below 2⁻²⁰ of the largest are rounding of zeros, and become zero.
    weights : sequence of n floats
        Multiply what is combined; they take no part in the election.
    density : float
        ⌊density · d⌋ coordinates of each task vector are kept, at least one, the earlier among
        those that are equal to 2⁻²⁰ of the largest.
    divisor : count or none
        Whether sums are divided by the number of agreeing task vectors.

    Returns
    -------
    array, (1, d)
        Flipping the signs of a coordinate in all task vectors flips it here: coordinates whose
        sum is exactly zero have no sign and stay zero.
    """
    xp = namespace(coordinates)
    size = coordinates.shape[1]
    if size == 0:
        return coordinates[:1, :]
    magnitudes = xp.abs(coordinates)
    largest = xp.max(magnitudes)
    real = magnitudes > RANK * largest
    # Coordinates that are equal but for rounding tie, so that rounding does not choose among them.
    steps = xp.round(magnitudes / (RANK * largest + xp.astype(largest == 0, largest.dtype)))
    kept = max(int(density * size), 1)
    trimmed = silence(coordinates, real & row_ranks_mask(steps, size, 0, kept))
    elected = sum_rows(trimmed)
    agreeing = ((trimmed > 0) & (elected > 0)) | ((trimmed < 0) & (elected < 0))
    shares = xp.asarray(weights, dtype=trimmed.dtype, device=trimmed.device)[:, None]
    total = sum_rows(silence(trimmed, agreeing) * shares)
    if divisor == "none":
        return total
    behind = sum_rows(xp.astype(agreeing, trimmed.dtype))
    return total / (behind + xp.astype(behind == 0, trimmed.dtype))
