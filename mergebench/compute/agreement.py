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
    coordinates = real(coordinates)
    magnitudes = xp.abs(coordinates)
    largest = xp.max(magnitudes)
    # Coordinates that are equal but for rounding tie, so that rounding does not choose among them.
    steps = xp.round(magnitudes / (RANK * largest + xp.astype(largest == 0, largest.dtype)))
    kept = max(int(density * size), 1)
    trimmed = silence(coordinates, row_ranks_mask(steps, size, 0, kept))
    return elected(trimmed, weights, divisor)


def real(coordinates: Any) -> Any:
    """Coordinates with those that are rounding of zeros at zero, (n, d)."""
    xp = namespace(coordinates)
    if 0 in coordinates.shape:
        return coordinates
    magnitudes = xp.abs(coordinates)
    return silence(coordinates, magnitudes > RANK * xp.max(magnitudes))


def elected(coordinates: Any, weights: Sequence[float], divisor: Divisor = "count") -> Any:
    """Elect a sign per coordinate and combine what agrees; the last steps of :func:`agreed`."""
    xp = namespace(coordinates)
    sign = sum_rows(coordinates)
    agreeing = ((coordinates > 0) & (sign > 0)) | ((coordinates < 0) & (sign < 0))
    shares = xp.asarray(weights, dtype=coordinates.dtype, device=coordinates.device)[:, None]
    total = sum_rows(silence(coordinates, agreeing) * shares)
    if divisor == "none":
        return total
    behind = sum_rows(xp.astype(agreeing, coordinates.dtype))
    return total / (behind + xp.astype(behind == 0, coordinates.dtype))
