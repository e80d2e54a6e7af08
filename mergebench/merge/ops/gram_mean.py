"""Mean over models by the inputs of each: linear layers whose outputs are nearest to all theirs."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal

from annotated_types import Interval

from mergebench.compute.matrices import as_matrices, matrix_shape
from mergebench.compute.namespace import namespace
from mergebench.compute.normal import shrunk, solved
from mergebench.compute.spectra import TOLERANCE
from mergebench.core.site import Site
from mergebench.merge.at import At, Collects, Stack
from mergebench.merge.op import op
from mergebench.merge.ops.fisher_mean import check_shares, weighted
from mergebench.merge.ops.mean import mean

Kind = Literal["gram", "gram_pp"]


def inputs_of(site: Site) -> int:
    """How many inputs a weight has: its columns, or rows where it is stored input × output."""
    return site.shape[0] if site.transposed else prod(site.shape[1:])


def _shapes(site: Site) -> tuple[tuple[int, ...], ...]:
    if len(site.shape) < 2 or not site.size:
        return ()
    count = inputs_of(site)
    square = ((count, count),)
    # An embedding is a layer whose inputs are one-hot: what counts is how often.
    return (*square, (site.shape[0],)) if len(site.shape) == 2 else square


def _held(models: int, site: Site) -> int:
    if len(site.shape) < 2:
        return 0
    return 8 * (2 * models + 6) * inputs_of(site) ** 2


def _workspace(models: int, rows: int, columns: int) -> int:
    return 8 * (models + 4) * rows * columns


@op(
    granularity="tensor",
    reduces=True,
    check_weights=check_shares,
    workspace=_workspace,
    tolerance=TOLERANCE,
    collects=lambda kind, **_: Collects(kind, _shapes, False, mean, _held),
)
def gram_mean(
    stack: Stack,
    at: At,
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.9,
    kind: Kind = "gram",
) -> Stack:
    """``(Σ_i w_i W_i Ĝ_i)(Σ_i w_i Ĝ_i)⁺`` for weights out × in and Ĝ_i the inputs' ``XᵀX``.

    Of all W that reach the least ``Σ_i w_i ‖X_i Wᵀ - X_i W_iᵀ‖²`` (at alpha = 1) it is the one
    nearest to the weighted mean, columns measured by their inputs; that mean itself where no
    model has any input.

    Parameters
    ----------
    alpha : float in [0, 1]
        Factor of the entries of ``XᵀX`` beside its diagonal.
    kind : gram or gram_pp
        Whether inputs are those of each model, or come through merged blocks.
    """
    xp = namespace(stack)
    found = at.collected
    weights = xp.asarray(at.weights, dtype=xp.float64, device=stack.device)
    middle = mean().apply(stack, at)
    if found.ndim == 2:
        return _by_counts(stack, weights[:, None] * found, at)
    if len(at.weights) == 1:
        return middle
    grams = shrunk(found, alpha) * weights[:, None, None]
    matrices, centre = as_matrices(stack, at.site), as_matrices(middle, at.site)
    asked = matrices[0, :, :] * 0.0
    for model in range(matrices.shape[0]):
        asked = asked + (matrices[model, :, :] - centre[0, :, :]) @ grams[model, :, :]
    merged = centre + solved(asked, xp.sum(grams, axis=0))[None, :, :]
    return _stack(merged, at.site, stack)


def _by_counts(stack: Stack, counts: Any, at: At) -> Stack:
    """Rows weighted by how often they were asked for; never asked for, by the weights."""
    xp = namespace(stack)
    total = xp.sum(counts, axis=0, keepdims=True)
    weights = xp.asarray(at.weights, dtype=xp.float64, device=stack.device)[:, None]
    plain = weights / xp.sum(weights)
    shares = xp.where(total > 0, counts / xp.where(total > 0, total, 1.0), plain)
    columns = matrix_shape(at.site.shape)[1]
    wide = xp.broadcast_to(shares[:, :, None], (*shares.shape, columns))
    return weighted(stack, xp.reshape(wide, stack.shape), at)


def _stack(matrices: Any, site: Site, like: Stack) -> Stack:
    xp = namespace(matrices)
    stored = xp.matrix_transpose(matrices) if site.transposed else matrices
    return xp.astype(xp.reshape(stored, (1, -1)), like.dtype, copy=False)
