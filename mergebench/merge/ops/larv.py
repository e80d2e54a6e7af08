"""LARV: scale layers by how their update fits the base and by their depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mergebench.compute.matrices import as_matrices
from mergebench.compute.namespace import as_numpy, namespace
from mergebench.compute.spectra import TOLERANCE, svd_bytes
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.op import op

Form = Literal["continuous", "tiers"]
#: A spread of conflicts below this is rounding.
_SPREAD = 1e-6
#: A numbered block: its stack and its index.
Layer = tuple[str, int]


def _workspace(models: int, rows: int, columns: int) -> int:
    square = 8 * (rows * rows + columns * columns)
    return svd_bytes(rows, columns) + 8 * (models + 2) * rows * columns + 2 * square


def effective_rank(matrix: Any) -> Any:
    """The exponential of the entropy of σ² / Σσ², between 1 and the rank; 0 for a zero matrix."""
    xp = namespace(matrix)
    squares = xp.linalg.svdvals(matrix) ** 2
    total = xp.sum(squares)
    none = xp.astype(total == 0, squares.dtype)
    shares = squares / (total + none)
    present = xp.astype(shares > 0, shares.dtype)
    return xp.exp(-xp.sum(shares * xp.log(shares + (1 - present)))) * (1 - none)


def conflict(base: Any, update: Any) -> Any:
    """``½ (‖W Δᵀ - Δ Wᵀ‖ + ‖Wᵀ Δ - Δᵀ W‖) / (‖W‖ ‖Δ‖)``: 0 if both commute, at most √2."""
    xp = namespace(update)
    outer, inner = base @ xp.matrix_transpose(update), xp.matrix_transpose(base) @ update
    apart = [xp.linalg.vector_norm(each - xp.matrix_transpose(each)) for each in (outer, inner)]
    lengths = xp.linalg.vector_norm(base) * xp.linalg.vector_norm(update)
    return (apart[0] + apart[1]) / 2 / (lengths + xp.astype(lengths == 0, lengths.dtype))


def gate(score: Any) -> Any:
    """``1 + ½ tanh(3 (score - 1))``, between ½ and 1½."""
    return 1 + namespace(score).tanh(3 * (score - 1)) / 2


def _look(stack: Stack, at: At) -> Sequence[tuple[Any, Any]] | None:
    """Ratio of effective ranks and conflict of one matrix, for every row of the stack."""
    site = at.site
    if site.block is None or len(site.shape) != 2 or site.size == 0:
        return None
    base, updates = as_matrices(at.base[None, :], site), as_matrices(stack, site)
    rank = effective_rank(base[0, :, :])
    found = []
    for row in range(updates.shape[0]):
        own = effective_rank(updates[row, :, :])
        if not rank or not own:
            return None
        found.append((rank / own, conflict(base[0, :, :], updates[row, :, :])))
    return found


def _measure(sweep: Sweep, form: Form, values: tuple[float, float, float]) -> Mapping[Layer, Any]:
    """The factors of every layer, (rows,)."""
    seen: dict[Layer, list[Any]] = {}
    lengths: dict[str, int] = {}
    for at, found in sweep(_look):
        site = at.site
        if site.block is None or not found:
            continue
        seen.setdefault((site.stack, site.block), []).append(found)
        lengths[site.stack] = site.layers
    if not seen:
        return {}
    layers = sorted(seen)
    rows = []
    for row in range(len(seen[layers[0]][0])):
        ratios = [_mean([each[row][0] for each in seen[layer]]) for layer in layers]
        conflicts = [_mean([each[row][1] for each in seen[layer]]) for layer in layers]
        depths = [(block + 1) / lengths[stack] for stack, block in layers]
        rows.append(_scales(ratios, conflicts, depths, form, values))
    xp = namespace(rows[0][0])
    return {layer: xp.stack([each[place] for each in rows]) for place, layer in enumerate(layers)}


def _mean(values: Sequence[Any]) -> Any:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total / len(values)


def _scales(
    ratios: Sequence[Any],
    conflicts: Sequence[Any],
    depths: Sequence[float],
    form: Form,
    values: tuple[float, float, float],
) -> list[Any]:
    xp = namespace(ratios[0])
    centre = _mean(conflicts)
    variance = _mean([(each - centre) ** 2 for each in conflicts])
    # Blocks whose conflicts differ by rounding alone conflict alike.
    even = xp.astype(variance <= _SPREAD**2, variance.dtype)
    spread = xp.sqrt(variance + even)
    scores = [
        ratio * depth**0.5 / (1 + xp.log1p(xp.exp((1 - even) * (each - centre) / spread)))
        for ratio, each, depth in zip(ratios, conflicts, depths, strict=True)
    ]
    if form == "continuous":
        return [gate(score) for score in scores]
    order = sorted(range(len(scores)), key=lambda place: (float(as_numpy(scores[place])), place))
    tiers = {place: values[3 * rank // len(order)] for rank, place in enumerate(order)}
    return [xp.full_like(score, tiers[place]) for place, score in enumerate(scores)]


def _statistic(form: Form, low: float, middle: float, high: float) -> Statistic:
    return Statistic("model", lambda sweep: _measure(sweep, form, (low, middle, high)))


@op(
    granularity="tensor",
    statistic=_statistic,
    needs_base=True,
    workspace=_workspace,
    tolerance=TOLERANCE,
    of_updates=True,
)
def larv(
    stack: Stack,
    at: At,
    form: Form = "continuous",
    low: float = 0.5,
    middle: float = 0.75,
    high: float = 1.0,
) -> Stack:
    """Multiply every block by a factor of its own, from its update and its base (LARV).

    Experimental: after notes on arXiv:2602.09413 rather than its text. For every matrix of a block,
    e is the effective rank of the base over that of the update and c how far both are from
    commuting; a block has the means of its matrices, c is standardised over blocks (ĉ), and block
    l of L has the score ``e √((l+1)/L) / (1 + log(1 + exp ĉ))``. Everything outside of numbered
    blocks stays as it is, and so do blocks without a matrix that has moved.

    Parameters
    ----------
    form : continuous or tiers, default continuous
        Factors ``1 + ½ tanh(3 (score - 1))``, or three fixed ones for the thirds of blocks with the
        lowest, middle and highest scores.
    low, middle, high : float, default 0.5, 0.75 and 1.0
        Those factors. The paper's values are not known here; these are a guess of others.
    """
    site = at.site
    if site.block is None or not at.value:
        return stack
    factors = at.value.get((site.stack, site.block))
    if factors is None:
        return stack
    xp = namespace(stack)
    return stack * xp.astype(factors, stack.dtype)[:, None]
