"""Scale the entries that one model alone has changed."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge

from mergebench.compute.namespace import as_numpy, namespace
from mergebench.core.tensor import Array
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.op import op

Scope = Literal["tensor", "model"]


def _measure(sweep: Sweep, r: float, alpha: float) -> list[float]:
    def visit(stack: Stack, at: At) -> Array:
        present = as_numpy(stack) != 0
        shared = np.count_nonzero(present, axis=0) > 1
        return np.stack(
            [
                np.count_nonzero(present & shared, axis=1),
                np.count_nonzero(present & ~shared, axis=1),
            ]
        )

    total = np.zeros((2, sweep.models), np.int64)
    for _, counts in sweep(visit):
        total += counts
    overlap = total[0] / np.maximum(total[1], 1)
    return [float(1 + r * min(each, alpha)) for each in overlap]


def _statistic(r: float, alpha: float, scope: Scope) -> Statistic | None:
    if r == 0 or alpha == 0:
        return None
    return Statistic(scope, partial(_measure, r=r, alpha=alpha))


@op(statistic=_statistic)
def scale_unique(
    stack: Stack,
    at: At,
    r: Annotated[float, Ge(0)] = 0.1,
    alpha: Annotated[float, Ge(0)] = 0.2,
    scope: Scope = "tensor",
) -> Stack:
    """Multiply what is unique to model i by ``1 + r · min(overlap_i / unique_i, alpha)``.

    An entry is unique to a model if it is zero in all others, and overlaps otherwise; the ratio is
    that of their numbers.

    Parameters
    ----------
    r : float >= 0
        Strength of the scaling.
    alpha : float >= 0
        Largest ratio that counts.
    scope : tensor or model
        Over what entries are counted.
    """
    if r == 0 or alpha == 0:
        return stack
    xp = namespace(stack)
    present = stack != 0
    unique = present & (xp.count_nonzero(present, axis=0) == 1)[None, :]
    extra = xp.asarray(at.value, dtype=stack.dtype, device=stack.device)[:, None] - 1
    return stack + stack * (xp.astype(unique, stack.dtype) * extra)
