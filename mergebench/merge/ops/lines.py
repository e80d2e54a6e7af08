"""LiNeS: scale layers linearly with their depth."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any

import numpy as np

from mergebench.compute.namespace import namespace
from mergebench.compute.sums import totals
from mergebench.core.errors import ParameterError
from mergebench.core.params import Examples
from mergebench.core.site import Site
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.kernels.stages import Multiply, Stages
from mergebench.merge.op import op

#: Words for `alpha` beside numbers.
NORMS, REST = "norms", "rest"


def parse_alpha(alpha: str, beta: float) -> float | None:
    """The factor of the shallowest layers; ``None`` where norms decide it.

    Raises
    ------
    ParameterError
        If it is neither a finite number nor one of the words.
    """
    if alpha == NORMS:
        return None
    if alpha == REST:
        return 1 - beta
    try:
        number = float(alpha)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise ParameterError(
            "lines: `alpha` must be a number, norms or rest", got=alpha, fix="give alpha=norms"
        )
    return number


def _check(site: Site, beta: float, alpha: str) -> None:
    parse_alpha(alpha, beta)


def _terms(stack: Stack, at: At) -> Stack:
    """Magnitudes of the sum of all task vectors, and of what has been merged, (2, m)."""
    assert at.models is not None
    total = at.models[0:1, :]
    for model in range(1, at.models.shape[0]):
        total = total + at.models[model : model + 1, :]
    xp = namespace(stack)
    # Several task vectors may still stand side by side: then each counts.
    return xp.abs(xp.concat([total, stack], axis=0))


def _measure(sweep: Sweep) -> Any:
    """``‖Σ τ_i‖₁ / ‖merged‖₁ / N``."""
    sums = totals(sweep, _terms, 1 + sweep.models)
    xp = namespace(sums)
    merged = sums[1:]
    empty = xp.astype(merged == 0, sums.dtype)
    return sums[0] * (1 - empty) / ((merged + empty) * max(sweep.inputs, 1))


def _statistic(beta: float, alpha: str) -> Statistic | None:
    return Statistic("model", _measure) if alpha == NORMS else None


def _is_linear(alpha: str = NORMS, **_: object) -> bool:
    return alpha != NORMS


def _stages(at: At, beta: float, alpha: str) -> Stages | None:
    first = parse_alpha(alpha, beta)
    slope = beta * (at.site.depth or 0.0)
    if first is not None:
        return (Multiply((first + slope,)),)
    return (Multiply(tuple(float(each) for each in at.value + slope)),)


@op(
    statistic=_statistic,
    linear=_is_linear,
    needs_models=True,
    check=_check,
    of_updates=True,
    fused=_stages,
)
def lines(
    stack: Stack,
    at: At,
    beta: float = 0.5,
    alpha: Annotated[str, Examples((NORMS, REST, "0.25"))] = NORMS,
) -> Stack:
    """Multiply every block by ``alpha + beta · depth``, so that shallow layers move least.

    Depth is 0 at the first and 1 at the last numbered block of a stack (1 in a stack of one), and
    counts anew in each stack of a model. Everything outside of numbered blocks is multiplied by
    ``alpha``: embeddings, but also the final norm and the output projection.

    Parameters
    ----------
    beta : float, default 0.5
        What the last block has more than the first.
    alpha : norms, rest or a number, default norms
        The factor of the first block. norms: ``‖Σ τ_i‖₁ / ‖merged‖₁ / N`` over the whole model, of
        N task vectors as they came in and of what they have become before this op; rest:
        ``1 - beta``, for a single task.
    """
    first = parse_alpha(alpha, beta)
    slope = beta * (at.site.depth or 0.0)
    if first is not None:
        return stack * (first + slope)
    xp = namespace(stack)
    measured = at.value
    if isinstance(measured, np.ndarray):
        # Measured on the host; what comes from another library may carry gradients.
        measured = xp.asarray(measured, device=stack.device)
    return stack * xp.astype(measured + slope, stack.dtype)[:, None]
