"""Weigh models column by column, by how far lengths and directions have moved (WIDEN)."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Interval

from mergebench.compute.matrices import as_matrices, as_stack
from mergebench.compute.namespace import namespace
from mergebench.compute.spectra import TOLERANCE
from mergebench.core.site import Site
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op


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
    rank exceeds ``ratio`` times its mean. Entries of vectors are scored by how far they have moved
    itself, in place of a rank.

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
        high = moved > ratio * xp.mean(moved, axis=1, keepdims=True)
        return stack * xp.astype(_importance(moved, high, calibration), stack.dtype)
    moved = as_matrices(stack, at.site)
    base = as_matrices(at.base[None, :], at.site)
    axis = 2 if _by_token(at.site) else 1
    lengths, angles = _divergences(base, moved, axis)
    shares = (_by_rank(lengths, ratio, calibration) + _by_rank(angles, ratio, calibration)) / 2
    return as_stack(moved * xp.expand_dims(shares, axis=axis), at.site, stack)


def _by_token(site: Site) -> bool:
    return site.kind == "embedding" and len(site.shape) == 2


def _divergences(base: Any, moved: Any, axis: int) -> tuple[Any, Any]:
    """How much the lengths of columns have changed, and 1 - cosine of their angles, (n, k)."""
    xp = namespace(moved)
    tuned = base + moved
    one, two = (xp.linalg.vector_norm(each, axis=axis) for each in (base, tuned))
    # Both from the difference: subtracting what is nearly equal would leave rounding.
    grown = xp.abs(xp.sum(moved * (base + tuned), axis=axis)) / _safe(one + two)
    units = [
        each / xp.expand_dims(_safe(size), axis=axis) for each, size in ((tuned, two), (base, one))
    ]
    apart = units[0] - units[1]
    turned = xp.sum(apart * apart, axis=axis) / 2
    # A column of zeros has no direction: it is at right angles to what has one.
    return grown, turned + xp.astype((one == 0) != (two == 0), turned.dtype) / 2


def _safe(sizes: Any) -> Any:
    return sizes + namespace(sizes).astype(sizes == 0, sizes.dtype)


def _by_rank(divergences: Any, ratio: float, calibration: float) -> Any:
    """The importance of ranks within each model, (n, k)."""
    xp = namespace(divergences)
    count = divergences.shape[1]
    # What is equal but for rounding ties; of equals the later one ranks higher.
    order = xp.argsort(xp.astype(divergences, xp.float32), axis=1, stable=True)
    places = xp.astype(xp.argsort(order, axis=1, stable=True), xp.float64)
    # Places, being whole numbers, meet their mean exactly.
    return _importance(places / count, places > ratio * (count - 1) / 2, calibration)


def _importance(significance: Any, high: Any, calibration: float) -> Any:
    """Softmax over models, (n, k); what is high is set."""
    xp = namespace(significance)
    raised = xp.exp(significance - xp.max(significance, axis=0, keepdims=True))
    total = raised[0:1, :]
    for model in range(1, raised.shape[0]):
        total = total + raised[model : model + 1, :]
    return xp.where(high, xp.full_like(significance, calibration), raised / total)
