"""Normal equations of least squares over several sets of inputs."""

from __future__ import annotations

from typing import Any

from mergebench.compute.namespace import namespace

#: Directions of less energy than this share of the largest hold rounding, not data.
LEAST = 1e-6


def shrunk(grams: Any, alpha: float) -> Any:
    """Gram matrices with the entries beside the diagonal multiplied by ``alpha``.

    Parameters
    ----------
    grams : float64 array, (n, k, k)
    alpha : float in [0, 1]
    """
    if alpha == 1:
        return grams
    xp = namespace(grams)
    own = xp.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    return alpha * grams + (1 - alpha) * grams * own


def solved(right: Any, gram: Any) -> Any:
    """``R S⁺`` for a symmetric S without negative eigenvalues whose row space holds that of R.

    S is taken relative to its diagonal, so that inputs in other units change nothing. Directions
    with less than 1e-6 of the energy of the largest count as absent.

    Parameters
    ----------
    right : float64 array, (m, k)
    gram : float64 array, (k, k)

    Returns
    -------
    float64 array, (m, k)
    """
    xp = namespace(gram)
    count = gram.shape[0]
    own = xp.eye(count, dtype=gram.dtype, device=gram.device)
    diagonal = xp.sum(gram * own, axis=0)
    there = diagonal > 0
    scale = xp.sqrt(xp.where(there, diagonal, 1.0))
    related = gram / (scale[:, None] * scale[None, :])
    # Inputs that are always zero stand alone, and nothing asks for them.
    related = related + own * xp.astype(~there, gram.dtype)
    inside = xp.where(there, right / scale, 0.0)
    found = _by_factors(inside, related)
    return (_by_vectors(inside, related) if found is None else found) / scale


def _by_factors(right: Any, gram: Any) -> Any | None:
    """``R S⁻¹``, or ``None`` where S is near to singular."""
    xp = namespace(gram)
    try:
        triangle = xp.linalg.cholesky(gram)
        pivots = xp.linalg.diagonal(triangle) ** 2
        if not bool(xp.min(pivots) > LEAST * gram.shape[0]):
            return None
        return xp.matrix_transpose(xp.linalg.solve(gram, xp.matrix_transpose(right)))
    except (ValueError, RuntimeError):
        # Both libraries derive "not positive definite" from one of these.
        return None


def _by_vectors(right: Any, gram: Any) -> Any:
    xp = namespace(gram)
    values, vectors = xp.linalg.eigh(gram)
    there = values > LEAST * xp.max(values)
    inverse = xp.where(there, 1.0 / xp.where(there, values, 1.0), 0.0)
    return ((right @ vectors) * inverse) @ xp.matrix_transpose(vectors)
