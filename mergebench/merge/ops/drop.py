"""Drop: zero entries at random and make up for them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import numpy as np
from annotated_types import Interval

from mergebench.compute.masking import silence
from mergebench.compute.namespace import namespace
from mergebench.compute.random import chosen, limit, stream_of
from mergebench.compute.rescaling import norm_ratios, rescaled
from mergebench.core.params import Seed
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.kernels.stages import Divide, Draw, Multiply, Stages
from mergebench.merge.op import op

Rescale = Literal["density", "l1", "none"]


def _mask(stack: Stack, at: At, density: float, seed: int) -> Stack:
    """True where an entry is kept, (n, m); the same whatever the entries are."""
    rows = [
        chosen(stream_of(seed, at.site.key, key), at.start, at.stop, density) for key in at.keys
    ]
    return namespace(stack).asarray(np.stack(rows), device=stack.device)


def _dropped(stack: Stack, at: At, density: float, seed: int) -> Stack:
    return silence(stack, _mask(stack, at, density, seed))


def _measure(sweep: Sweep, density: float, seed: int) -> Stack:
    return norm_ratios(sweep, partial(_dropped, density=density, seed=seed))


def _statistic(density: float, seed: int, rescale: Rescale) -> Statistic | None:
    if rescale != "l1" or density >= 1:
        return None
    return Statistic("tensor", partial(_measure, density=density, seed=seed))


def _stages(at: At, density: float, seed: int, rescale: Rescale) -> Stages | None:
    if density >= 1:
        return ()
    streams = tuple(stream_of(seed, at.site.key, key) for key in at.keys)
    drawn = Draw(streams, (limit(density),) * len(streams))
    if rescale == "l1":
        return drawn, Multiply(tuple(map(float, at.value)))
    return (drawn, Divide((density,))) if rescale == "density" else (drawn,)


@op(statistic=_statistic, alone=True, fused=_stages)
def drop(
    stack: Stack,
    at: At,
    density: Annotated[float, Interval(gt=0, le=1)],
    seed: Seed = 0,
    rescale: Rescale = "density",
) -> Stack:
    """Keep every entry with probability ``density``, drop the others, and rescale (DARE, step 1).

    Which entries stay depends on the seed, the tensor's name, what the model holds and the index,
    so not on the order of models, threads or tiles; a model given twice is drawn for twice.

    Parameters
    ----------
    density : float in (0, 1]
        Probability that an entry stays, 1 - p.
    seed : int, default 0
    rescale : density, l1 or none
        Divide what stays by ``density``, so that the expected update is the update; multiply it by
        the ratio that gives each tensor the L1 norm that it had; or leave it.
    """
    if density >= 1:
        return stack
    kept = _dropped(stack, at, density, seed)
    if rescale == "l1":
        return rescaled(kept, at.value)
    return kept / density if rescale == "density" else kept
