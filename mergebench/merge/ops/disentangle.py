"""Weigh models column by column, by how far lengths and directions have moved (WIDEN)."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Interval

from mergebench.compute.matrices import as_matrices, as_stack
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE
from mergebench.core.site import Site
from mergebench.merge.op import At, Stack, op


def _workspace(models: int, rows: int, columns: int) -> int:
    return 8 * 4 * (models + 1) * rows * columns


@op(granularity="tensor", needs_base=True, workspace=_workspace, tolerance=TOLERANCE)
def disentangle(
    stack: Stack,
    at: At,
    ratio: Annotated[float, Interval(ge=0)] = 1.0,
    calibration: float = 1.0,
) -> Stack:
    """Multiply every column by its importance: the mean of that of its length and its direction.

    A column is what belongs to one input feature, or to one token of an embedding. How much its
    length has changed, and 1 - cos of the angle it has turned by, are ranked within each model from
    0 to 1 - 1/k; importance is the softmax of the ranks over models, and ``calibration`` where the
    rank exceeds ``ratio`` times its mean. Entries of vectors are ranked by how far they have moved.

    Parameters
    ----------
    ratio : float >= 0, default 1.0
        Ranks above this many times the mean rank are important in their own right.
    calibration : float, default 1.0
        The importance of those.
    """
    if stack.shape[1] == 0:
        return stack
    xp = namespace(stack)
    if len(at.site.shape) < 2:
        moved = xp.abs(xp.astype(stack, xp.float64, copy=False))
        return stack * xp.astype(_importance(moved, ratio, calibration), stack.dtype)
    moved = as_matrices(stack, at.site)
    base = as_matrices(at.base[None, :], at.site)
    axis = 2 if _by_token(at.site) else 1
    lengths, angles = _divergences(base, moved, axis)
    shares = (
        _importance(lengths, ratio, calibration) + _importance(angles, ratio, calibration)
    ) / 2
    return as_stack(moved * xp.expand_dims(shares, axis=axis), at.site, stack)


def _by_token(site: Site) -> bool:
    return site.kind == "embedding" and len(site.shape) == 2


def _divergences(base: Any, moved: Any, axis: int) -> tuple[Any, Any]:
    """How much the lengths of columns have changed, and 1 - cosine of their angles, (n, k)."""
    xp = namespace(moved)
    tuned = base + moved
    one, two = (xp.sqrt(xp.sum(each * each, axis=axis)) for each in (base, tuned))
    both = one * two
    safe = both + xp.astype(both == 0, both.dtype)
    turned = 1 - xp.sum(base * tuned, axis=axis) / safe
    # What has not moved has turned by nothing, also where rounding sees an angle.
    still = xp.sum(moved * moved, axis=axis) == 0
    return xp.abs(two - one), turned * (1 - xp.astype(still, turned.dtype))


def _importance(divergences: Any, ratio: float, calibration: float) -> Any:
    """Softmax over models of ranks within each, (n, k); high ranks are set."""
    xp = namespace(divergences)
    count = divergences.shape[1]
    # Of equals the later one ranks higher, as a stable sort leaves them.
    order = xp.argsort(divergences, axis=1, stable=True)
    places = xp.astype(xp.argsort(order, axis=1, stable=True), xp.float64)
    raised = xp.exp(places / count)
    total = raised[0:1, :]
    for model in range(1, raised.shape[0]):
        total = total + raised[model : model + 1, :]
    # Places, being whole numbers, meet their mean exactly.
    high = places > ratio * (count - 1) / 2
    return xp.where(high, xp.full_like(places, calibration), raised / total)
