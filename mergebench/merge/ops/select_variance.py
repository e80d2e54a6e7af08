"""Select the entries in which models differ most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from annotated_types import Interval

from mergebench.compute.cut import Cut
from mergebench.compute.keep import keep_mask
from mergebench.compute.masking import silence
from mergebench.compute.namespace import as_numpy, namespace
from mergebench.compute.select import kth_magnitudes
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.op import op

R = TypeVar("R")
Count = Literal["exact", "nonzero"]
#: Stands for a variance of zero, since searches for thresholds pass over zeros.
_LEAST = 5e-324


def variances(stack: Stack) -> Stack:
    """n² times the variance over models of every entry, (1, m) in float64; 5e-324 for zero.

    ``n Σ x² - (Σ x)²`` is exact for entries of up to 16 bits and order-free with it, so that the
    same values in another order tie.
    """
    xp = namespace(stack)
    wide = xp.astype(stack, xp.float64)
    first = wide[0:1, :]
    total, squares = first, first * first
    alike = xp.ones_like(first, dtype=xp.bool)
    for model in range(1, wide.shape[0]):
        line = wide[model : model + 1, :]
        total, squares = total + line, squares + line * line
        alike = alike & (line == first)
    spread = wide.shape[0] * squares - total * total
    return xp.where(alike | (spread <= 0), _LEAST, spread)


@dataclass(frozen=True)
class _Variances:
    """A sweep over variances instead of entries."""

    sweep: Sweep
    models: int = 1

    @property
    def size(self) -> int:
        return self.sweep.size

    def __call__(self, visit: Callable[[Stack, At], R]) -> Iterator[tuple[At, R]]:
        return self.sweep(lambda stack, at: visit(variances(stack), at))

    def sample(self, count: int) -> Stack:
        return variances(self.sweep.sample(count))


def _measure(sweep: Sweep, select_topk: float, count: Count) -> list[Cut]:
    found = _Variances(sweep)
    size = sweep.size
    if count == "nonzero":

        def visit(stack: Stack, at: At) -> int:
            return int(np.count_nonzero(as_numpy(stack) > _LEAST))

        size = sum(number for _, number in found(visit))
    return kth_magnitudes(found, [[int(select_topk * size)]])[0]


def _statistic(select_topk: float, count: Count) -> Statistic | None:
    if select_topk >= 1:
        return None
    return Statistic("tensor", partial(_measure, select_topk=select_topk, count=count))


@op(statistic=_statistic)
def select_variance(
    stack: Stack,
    at: At,
    select_topk: Annotated[float, Interval(gt=0, le=1)],
    count: Count = "exact",
) -> Stack:
    """Keep, in all models alike, the entries with the largest variance over models (SCE, step 1).

    A single model has no variance and is kept whole.

    Parameters
    ----------
    select_topk : float in (0, 1]
        Share of entries kept in each tensor, τ.
    count : exact or nonzero
        Keep ⌊τd⌋ of d entries, the earlier first among equals; or count in d only those entries
        in which models differ.
    """
    if select_topk >= 1 or stack.shape[0] == 1:
        return stack
    mask: Any = keep_mask(variances(stack), at.value, at.site.name, at.start)
    return silence(stack, mask)
