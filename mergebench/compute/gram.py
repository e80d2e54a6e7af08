"""Sums over a whole tensor that are streamed, and inner products of models made of them.

Sums are taken over blocks of entries whose places are fixed by the tensor alone, and added up in
order, and then those of tensors by name, so that no bit depends on tiles, threads or machines. All
of it is float64 and follows the array API: numpy runs it without torch, and torch gives gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergebench.compute.namespace import namespace
from mergebench.core.errors import MergebenchError

#: Entries that are summed at once; the least tile holds one block.
BLOCK = 1 << 12
#: Sums that run side by side in a block, before they are added up: entry i belongs to sum i mod 64.
LANES = 64
#: Shares whose sum is this near to 1 are those of an average.
_EVEN = 1e-12

Measure = Callable[[Any], Any]


def gram(sweep: Any) -> Any:
    """Inner products of all pairs of models over one tensor.

    Parameters
    ----------
    sweep : Sweep
        Over one tensor, with stacks of shape (n, m).

    Returns
    -------
    float64 array, (n, n)

    Raises
    ------
    MergebenchError
        If a product exceeds float64, which takes entries beyond 1e150.
    """
    return block_sums(sweep, block_products)


def block_products(stack: Any) -> Any:
    """Inner products of all pairs of models over blocks, in a fixed order of sums.

    Arrays of other libraries than numpy are summed as these do it.

    Parameters
    ----------
    stack : array, (n, b, m)

    Returns
    -------
    float64 array, (b, n, n)
    """
    if not isinstance(stack, np.ndarray):
        return inner_products(stack)
    count, blocks, size = stack.shape
    wide = np.zeros((count, blocks, -(-size // LANES), LANES))
    wide.reshape(count, blocks, -1)[:, :, :size] = stack
    found = np.empty((blocks, count, count))
    for one in range(count):
        for other in range(one, count):
            # Over an axis that is not the last, numpy adds one entry after the other.
            lanes = np.add.reduce(wide[one] * wide[other], axis=1)
            while lanes.shape[1] > 1:
                half = lanes.shape[1] // 2
                lanes = lanes[:, :half] + lanes[:, half:]
            found[:, one, other] = found[:, other, one] = lanes[:, 0]
    return found


def inner_products(stack: Any) -> Any:
    """Inner products of all pairs of models over the last axis.

    Parameters
    ----------
    stack : array, (n, b, m)

    Returns
    -------
    float64 array, (b, n, n)
    """
    xp = namespace(stack)
    wide = xp.astype(stack, xp.float64)
    count = wide.shape[0]
    # Products of vectors rather than of matrices, whose order a BLAS may choose by their number,
    # and which for few models take four times as long.
    found = {
        (one, other): xp.vecdot(wide[one, ...], wide[other, ...])
        for one in range(count)
        for other in range(one, count)
    }
    lines = [
        xp.stack([found[min(one, other), max(one, other)] for other in range(count)], axis=-1)
        for one in range(count)
    ]
    return xp.stack(lines, axis=-2)


def row_inner_products(stack: Any, row: int) -> Any:
    """Inner products of all pairs of models over every row of ``row`` entries.

    Parameters
    ----------
    stack : array, (n, rows · row)

    Returns
    -------
    float64 array, (rows, n, n)
    """
    return inner_products(namespace(stack).reshape(stack, (stack.shape[0], -1, row)))


def block_sums(sweep: Any, measure: Measure) -> Any:
    """The sum of ``measure`` over the blocks of a tensor.

    Parameters
    ----------
    sweep : Sweep
        Over one tensor.
    measure : callable
        Gives a float64 array (b, …) for an (n, b, m) array with b stretches of the tensor. Arrays
        of other libraries than numpy are given as one stretch.

    Raises
    ------
    MergebenchError
        If the sum is not finite.
    """
    found = grouped_sums(sweep, measure, lambda site: "")
    return found[""] if found else measure(np.zeros((sweep.models, 1, 0)))[0]


def grouped_sums(sweep: Any, measure: Measure, group: Callable[[Any], str]) -> dict[str, Any]:
    """As :func:`block_sums`, over groups of tensors.

    Parameters
    ----------
    sweep : Sweep
        Over any number of tensors.
    measure : callable
    group : callable
        ``(site) -> str``: the group that a tensor belongs to.

    Returns
    -------
    dict of group to float64 array
        Without groups that have no entries.
    """
    totals: dict[str, Any] = {}
    own = _Added(measure)
    site: Any = None

    def close() -> None:
        if site is None or own.total is None:
            return
        key = group(site)
        totals[key] = totals[key] + own.total if key in totals else own.total
        if isinstance(totals[key], np.ndarray) and not np.isfinite(totals[key]).all():
            raise MergebenchError(
                f"{site.name}: inner products exceed float64", fix="scale the inputs down"
            )

    for at, parts in sweep(_Look(measure)):
        if site is None or at.site.name != site.name:
            close()
            own, site = _Added(measure), at.site
        own.add(parts)
    close()
    return totals


#: Sums over whole blocks of a tensor (b, …), marked ``None``, and copies of the entries of others,
#: marked by whether their block ends with them.
Parts = list[tuple[Any, bool | None]]


class _Added:
    """The sum over a tensor as far as it has been seen, and what has been cut from its end."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.total: Any = None
        self.held: list[Any] = []

    # What overflows is found, and refused, when all is added up.
    @np.errstate(over="ignore", invalid="ignore")
    def add(self, parts: Iterable[tuple[Any, bool | None]]) -> None:
        for found, ends in parts:
            if ends is None:
                self.total = _onto(self.total, found)
                continue
            # What tiles have cut is put together again before it is summed.
            self.held.append(found)
            if ends:
                whole = np.concatenate(self.held, axis=1)
                self.held = []
                self.add([(self.measure(whole[:, None, :]), None)])


def _onto(total: Any, blocks: Any) -> Any:
    """A sum, and blocks (b, …) added to it one after the other."""
    if isinstance(blocks, np.ndarray):
        # Sums would be taken in pairs where there is a single number per block.
        begun = blocks if total is None else np.concatenate([total[None, ...], blocks])
        return np.add.accumulate(begun, axis=0)[-1].copy() if len(begun) else total
    for block in blocks:
        total = block if total is None else total + block
    return total


@dataclass(frozen=True)
class _Look:
    """Sums over the blocks of a tile, see :func:`_sums`."""

    measure: Measure

    def __call__(self, stack: Any, at: Any) -> Parts:
        return _sums(self.measure, stack, at)

    def fold(self, parts: Sequence[tuple[int, int, Parts]]) -> Parts:
        """The sum of the beginning of a tensor, and what has been cut from its end."""
        own = _Added(self.measure)
        for _, _, each in parts:
            own.add(each)
        held: Parts = [(part, False) for part in own.held]
        return held if own.total is None else [(own.total[None, ...], None), *held]

    def by_kernel(self, kernel: Any, at: Any) -> Parts | None:
        """The same from stored entries, where that can be."""
        whole = at.start % BLOCK == 0 and (at.stop % BLOCK == 0 or at.stop == at.site.size)
        if self.measure is not block_products or not whole:
            return None
        found = kernel.products()
        return None if found is None else [(found, None)]


# What overflows is found, and refused, when all is added up.
@np.errstate(over="ignore", invalid="ignore")
def _sums(measure: Measure, stack: Any, at: Any) -> Parts:
    if not isinstance(stack, np.ndarray):
        return [(measure(stack[:, None, :]), None)]
    count, size = stack.shape[0], at.site.size
    head = min(-(-at.start // BLOCK) * BLOCK, at.stop)
    tail = max(at.stop // BLOCK * BLOCK, head)
    found: Parts = []
    for begin, end in ((at.start, head), (head, tail), (tail, at.stop)):
        part = stack[:, begin - at.start : end - at.start]
        if begin == head and end == tail and begin < end:
            found.append((measure(part.reshape(count, -1, BLOCK)), None))
        elif begin < end:
            found.append((part.copy(), end % BLOCK == 0 or end == size))
    return found


def combined(stack: Any, shares: Any, pivot: int = 0) -> Any:
    """``Σ_i shares_i · x_i`` over the first axis of a stack, which becomes 1, in its dtype.

    Where the shares sum to 1, entries that are equal in all models stay as they are.

    Parameters
    ----------
    stack : array, (n, …)
    shares : float64 array, (n,) or (n, …), broadcast over the stack
    pivot : int
        The model with the largest share, from which the others are reached.
    """
    xp = namespace(stack)
    even = is_even(shares)
    if shares.ndim < stack.ndim:
        ones = (1,) * (stack.ndim - shares.ndim)
        shares, even = (xp.reshape(each, (*each.shape, *ones)) for each in (shares, even))
    weights = xp.astype(shares, stack.dtype)
    if isinstance(stack, np.ndarray) and even.size == 1:
        return _moved(stack, weights, pivot) if even.all() else _summed(stack, weights)
    return xp.where(even, _moved(stack, weights, pivot), _summed(stack, weights))


def is_even(shares: Any) -> Any:
    """Whether shares of models, (n, …), are those of an average, (1, …)."""
    total = shares[0:1, ...]
    for model in range(1, shares.shape[0]):
        total = total + shares[model : model + 1, ...]
    return namespace(shares).abs(total - 1) < _EVEN


def _summed(stack: Any, weights: Any) -> Any:
    total = stack[0:1, ...] * weights[0:1, ...]
    for model in range(1, stack.shape[0]):
        total = total + stack[model : model + 1, ...] * weights[model : model + 1, ...]
    return total


def _moved(stack: Any, weights: Any, pivot: int) -> Any:
    start = stack[pivot : pivot + 1, ...]
    step = None
    for model in range(stack.shape[0]):
        if model != pivot:
            part = (stack[model : model + 1, ...] - start) * weights[model : model + 1, ...]
            step = part if step is None else step + part
    return start if step is None else start + step
