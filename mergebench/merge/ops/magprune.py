"""MagPrune: drop entries at random, small ones more often."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Annotated, Literal

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from mergebench.compute.masking import silence
from mergebench.compute.namespace import namespace
from mergebench.compute.random import as_shares, draws, stream_of
from mergebench.compute.ranks import by_row_rank
from mergebench.compute.rescaling import norm_ratios, rescaled
from mergebench.core.errors import ParameterError
from mergebench.core.params import Seed
from mergebench.core.site import Site
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.kernels.stages import Divide, Draw, Multiply, RowDraw, Stage, Stages
from mergebench.merge.op import Granularity, op

Rescale = Literal["probability", "l1", "none"]


def probabilities(row: int, density: float, epsilon: float) -> NDArray[np.float64]:
    """Keep probabilities of a row's magnitudes, the smallest first, (row,) in float64."""
    if row == 1:
        return np.array([density])
    return (density - epsilon) + np.arange(row) / (row - 1) * 2 * epsilon


def _kept(stack: Stack, at: At, density: float, epsilon: float, seed: int, divide: bool) -> Stack:
    xp = namespace(stack)
    shares = np.stack(
        [as_shares(draws(stream_of(seed, at.site.key, k), at.start, at.stop)) for k in at.keys]
    )
    table = probabilities(at.site.row, density, epsilon)
    chances = by_row_rank(stack, at.site.row, table)
    mask = xp.asarray(shares, device=stack.device) < chances
    kept = silence(stack, mask)
    return kept / xp.astype(chances, stack.dtype) if divide else kept


def _measure(sweep: Sweep, density: float, epsilon: float, seed: int) -> Stack:
    change = partial(_kept, density=density, epsilon=epsilon, seed=seed, divide=False)
    return norm_ratios(sweep, change)


def _statistic(density: float, epsilon: float, seed: int, rescale: Rescale) -> Statistic | None:
    if rescale != "l1" or density >= 1:
        return None
    return Statistic("tensor", partial(_measure, density=density, epsilon=epsilon, seed=seed))


def _granularity(density: float, **_: object) -> Granularity:
    return "entry" if density >= 1 else "row"


def _check(site: Site, density: float, epsilon: float, **_: object) -> None:
    if density < 1 and not 0 < density - epsilon <= density + epsilon <= 1:
        raise ParameterError(
            "magprune: density - epsilon and density + epsilon must be probabilities in (0, 1]",
            got=f"density {density:g}, epsilon {epsilon:g}",
            fix=f"give an epsilon of at most {min(density, 1 - density):g}",
        )


def _stages(at: At, density: float, epsilon: float, seed: int, rescale: Rescale) -> Stages | None:
    if density >= 1:
        return ()
    streams = tuple(stream_of(seed, at.site.key, key) for key in at.keys)
    count, divide = len(streams), rescale == "probability"
    found: list[Stage] = []
    if at.site.row == 1 or epsilon == 0:
        # One probability for all, below which a share must be.
        found += [Draw(streams, (ceil(density * 2.0**32),) * count)]
        found += [Divide((density,))] if divide else []
    else:
        found += [RowDraw(streams, (density - epsilon,) * count, (epsilon,) * count, divide)]
    if rescale == "l1":
        found += [Multiply(tuple(map(float, at.value)))]
    return tuple(found)


@op(granularity=_granularity, statistic=_statistic, check=_check, alone=True, fused=_stages)
def magprune(
    stack: Stack,
    at: At,
    density: Annotated[float, Interval(gt=0, le=1)],
    epsilon: Annotated[float, Interval(ge=0, le=0.5)] = 0.0,
    seed: Seed = 0,
    rescale: Rescale = "probability",
) -> Stack:
    """Keep entries at random, the large ones of a row more often, and rescale (DELLA, step 1).

    The entry of rank r (1 is the smallest magnitude) of a row of n stays with probability
    ``density - epsilon + (r - 1)/(n - 1) · 2 epsilon``, with ``density`` in a row of one. Among
    equal magnitudes the later entry has the lower rank. Randomness is that of ``drop``.

    Parameters
    ----------
    density : float in (0, 1]
        Mean probability that an entry stays, 1 - p. A row is the last dimension; a vector is one.
    epsilon : float in [0, 0.5], default 0
        Half the distance between the largest and the smallest probability; both must be in (0, 1]
        unless the density is 1, which keeps everything.
    seed : int, default 0
    rescale : probability, l1 or none
        Divide what stays by its own probability; multiply it by the ratio that gives each tensor
        the L1 norm that it had; or leave it.
    """
    if density >= 1:
        return stack
    kept = _kept(stack, at, density, epsilon, seed, rescale == "probability")
    return rescaled(kept, at.value) if rescale == "l1" else kept
