"""Mean over models weighted, entry by entry, by what the data of each say of its entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from annotated_types import Ge

from mergebench.compute.gram import grouped_sums
from mergebench.compute.masking import moved
from mergebench.compute.namespace import namespace
from mergebench.compute.seen import Seen
from mergebench.core.errors import ParameterError
from mergebench.core.site import Site
from mergebench.merge.at import At, Collects, Stack, Statistic, Sweep
from mergebench.merge.op import op
from mergebench.merge.ops.mean import mean

R = TypeVar("R")
FloorAt = Literal["normalized", "raw"]
Favor = Literal["all", "first"]


def check_shares(weights: Sequence[float], **_: object) -> None:
    """Refuse weights that make no mean: a negative one, or none above zero.

    Raises
    ------
    ParameterError
    """
    if min(weights) < 0 or sum(weights) <= 0:
        raise ParameterError(
            "weights of a mean by statistics must be at least 0, and one above",
            got=str(list(weights)),
        )


def _shapes(site: Site) -> tuple[tuple[int, ...], ...]:
    return (site.shape,)


def _in_place(stack: Stack, at: At) -> tuple[Any, At]:
    """What was collected in place of the entries; zeros where nothing was."""
    if at.collected is not None:
        return at.collected, at
    xp = namespace(stack)
    return xp.zeros(stack.shape, dtype=xp.float64, device=stack.device), at


@dataclass(frozen=True)
class _Collected:
    """A sweep over what was collected in place of the entries."""

    sweep: Sweep

    @property
    def models(self) -> int:
        return self.sweep.models

    @property
    def inputs(self) -> int:
        return self.sweep.inputs

    @property
    def size(self) -> int:
        return self.sweep.size

    def __call__(self, visit: Callable[[Stack, At], R]) -> Iterator[tuple[At, R]]:
        return self.sweep(Seen(visit, _in_place))

    def sample(self, count: int) -> Stack:
        return self.sweep.sample(count)


def _squares(stack: Any) -> Any:
    xp = namespace(stack)
    wide = xp.astype(stack, xp.float64, copy=False)
    return xp.vecdot(wide, wide).T


def _norms(sweep: Sweep) -> Any:
    """The length of what was collected of each model, (n,), over all that is merged."""
    found = grouped_sums(_Collected(sweep), _squares, lambda site: "")
    if not found:
        return np.ones(sweep.models)
    return namespace(found[""]).sqrt(found[""])


@op(
    statistic=lambda normalize, **_: Statistic("model", _norms) if normalize else None,
    reduces=True,
    check_weights=check_shares,
    ordered=lambda favor, **_: favor == "first",
    collects=Collects("fisher", _shapes, entries=True, otherwise=mean),
)
def fisher_mean(
    stack: Stack,
    at: At,
    floor: Annotated[float, Ge(0)] = 1e-6,
    normalize: bool = True,
    floor_at: FloorAt = "normalized",
    favor: Favor = "all",
) -> Stack:
    """``Σ_i w_i F_i x_i / Σ_i w_i F_i`` entry by entry; where that is 0/0, ``Σ w_i x_i / Σ w_i``.

    Parameters
    ----------
    floor : float >= 0
        Least F of an entry.
    normalize : true or false
        Divide each model's F by its length over all that is merged.
    floor_at : normalized or raw
        Whether the floor is for F as it is divided, or as it was collected.
    favor : all or first
        Whose F the floor is for: every model's, or that of the first one the user names.
    """
    xp = namespace(stack)
    count = stack.shape[0]
    weights = xp.asarray(at.weights, dtype=xp.float64, device=stack.device)[:, None]
    found = at.collected
    units = xp.ones_like(weights)
    if normalize:
        lengths = xp.asarray(at.value, dtype=xp.float64, device=stack.device)[:, None]
        units = xp.where(lengths > 0, lengths, 1.0)
    least = floor * (units if floor_at == "normalized" else xp.ones_like(units))
    if favor == "first":
        first = at.in_order(count)[0]
        rows = xp.asarray([float(row == first) for row in range(count)], dtype=xp.float64)
        least = least * xp.asarray(rows, device=stack.device)[:, None]
    shares = weights / units * xp.where(found > least, found, least)
    total = xp.sum(shares, axis=0, keepdims=True)
    empty = total == 0
    shares = xp.where(empty, weights, shares)
    total = xp.where(empty, xp.sum(weights), total)
    return weighted(stack, shares / total, at)


def weighted(stack: Stack, shares: Any, at: At) -> Stack:
    """``Σ_i s_i x_i`` where the shares of an entry sum to 1.

    Parameters
    ----------
    shares : float64 array, (n, m)
    at : At
        Whose heaviest model is the one that the others move.
    """
    xp = namespace(stack)
    # Entries that are equal in all models stay as they are, to the last bit.
    pivot = max(range(stack.shape[0]), key=lambda model: abs(at.weights[model]))
    start = stack[pivot : pivot + 1, :]
    step = None
    for model in range(stack.shape[0]):
        if model != pivot:
            away = xp.astype(stack[model : model + 1, :] - start, xp.float64, copy=False)
            part = away * shares[model : model + 1, :]
            step = part if step is None else step + part
    return start if step is None else moved(start, xp.astype(step, stack.dtype, copy=False))
