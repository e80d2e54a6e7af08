"""Spherical linear interpolation of two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Interval

from mergebench.compute.gram import combined, gram, row_inner_products
from mergebench.compute.namespace import namespace
from mergebench.core.errors import ParameterError
from mergebench.merge.at import At, Stack, Statistic
from mergebench.merge.kernels.stages import Stages, combination
from mergebench.merge.op import Granularity, op

Scope = Literal["row", "tensor"]


def _statistic(threshold: float, scope: Scope) -> Statistic | None:
    return Statistic("tensor", gram) if scope == "tensor" else None


def _granularity(threshold: float, scope: Scope) -> Granularity:
    return "row" if scope == "row" else "entry"


def check_total(owner: str, weights: Sequence[float]) -> None:
    """Refuse weights that have no shares, since they sum to zero."""
    if sum(weights) == 0:
        raise ParameterError(
            f"{owner}: the weights sum to zero", got=str(list(weights)), fix="give other weights"
        )


def _check(weights: Sequence[float], threshold: float, scope: Scope) -> None:
    check_total("slerp", weights)


def _stages(at: At, threshold: float, scope: Scope) -> Stages | None:
    if len(at.weights) == 1:
        return ()
    if scope == "row":
        return None
    return combination(_shares(at.value, at.weights, threshold), _pivot(at.weights))


def _pivot(weights: Sequence[float]) -> int:
    return max(range(len(weights)), key=lambda model: abs(weights[model]))


@op(
    granularity=_granularity,
    statistic=_statistic,
    reduces=True,
    most=2,
    check_weights=_check,
    fused=_stages,
)
def slerp(
    stack: Stack,
    at: At,
    threshold: Annotated[float, Interval(ge=0, le=1)] = 0.9995,
    scope: Scope = "tensor",
) -> Stack:
    """``(sin((1-t)θ) a + sin(tθ) b) / sin θ`` with θ between a and b and t = w_b / (w_a + w_b).

    Parameters
    ----------
    threshold : float in [0, 1]
        Where ``|cos θ|`` is above it, or a or b is zero, the result is ``(1-t) a + t b``.
    scope : row or tensor
        What counts as a vector. A row is the last dimension; a vector is one row.

    Raises
    ------
    ParameterError
        For more than two models, or weights that sum to zero.
    """
    _check(at.weights, threshold, scope)
    pivot = _pivot(at.weights)
    if stack.shape[0] == 1:
        return stack
    xp = namespace(stack)
    if scope == "tensor":
        return combined(stack, _shares(at.value, at.weights, threshold), pivot)
    if stack.shape[1] == 0:
        return stack[0:1, :]
    shares = _shares(row_inner_products(stack, at.site.row), at.weights, threshold)
    lines = xp.reshape(stack, (stack.shape[0], -1, at.site.row))
    return xp.reshape(combined(lines, shares[:, :, None], pivot), (1, -1))


def _shares(products: Stack, weights: Sequence[float], threshold: float) -> Stack:
    """Coefficients of both models, (2,) or (2, rows), from inner products (…, 2, 2)."""
    xp = namespace(products)
    t = weights[1] / (weights[0] + weights[1])
    squares = products[..., 0, 0], products[..., 1, 1]
    known = (squares[0] > 0) & (squares[1] > 0)
    # Roots and quotients are taken of harmless numbers where they are not used: the derivative
    # of what is not chosen must be a number too.
    lengths = [xp.sqrt(xp.where(known, square, 1.0)) for square in squares]
    cosine = products[..., 0, 1] / lengths[0] / lengths[1]
    curved = known & (xp.abs(cosine) <= threshold) & (xp.abs(cosine) < 1)
    angle = xp.acos(xp.where(curved, cosine, 0.0))
    sine = xp.sin(angle)
    parts = [xp.where(curved, xp.sin(share * angle) / sine, share) for share in (1.0 - t, t)]
    return xp.stack(parts)
