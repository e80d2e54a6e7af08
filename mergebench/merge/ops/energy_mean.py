"""Mean over models weighted by their energy, without minority signs."""

from __future__ import annotations

from typing import Any, Literal

from mergebench.compute.gram import block_sums
from mergebench.compute.masking import silence
from mergebench.compute.namespace import namespace
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.op import op

Tie = Literal["zero", "plus", "minus"]
#: What is left of shares of both signs that cancel, of their sizes: rounding.
_VANISHED = 1e-6


def _squares(stack: Any) -> Any:
    xp = namespace(stack)
    wide = xp.astype(stack, xp.float64)
    return xp.vecdot(wide, wide).T


def _energies(sweep: Sweep) -> Any:
    return block_sums(sweep, _squares)


@op(statistic=lambda **_: Statistic("tensor", _energies), reduces=True)
def energy_mean(stack: Stack, at: At, tie: Tie = "zero") -> Stack:
    """``Σ_A η_i x_i / Σ_A η_i`` over the models A with the sign of ``Σ_i x_i`` (SCE, steps 2, 3).

    η_i is the user's weight of model i times the sum of squares of its tensor. Where they cancel,
    as those of both signs may, the mean is zero.

    Parameters
    ----------
    tie : zero, plus or minus
        The sign where the values sum to exactly zero: none, positive or negative.
    """
    xp = namespace(stack)
    given = xp.asarray(at.weights, dtype=xp.float64, device=stack.device)
    energies = at.value * given
    largest = xp.max(xp.abs(energies))
    # Relative to the largest: energies themselves may lie beyond float32.
    shares = xp.astype(energies / xp.where(largest > 0, largest, 1.0), stack.dtype)[:, None]
    total = _added(stack)
    positive, negative = total > 0, total < 0
    if tie == "plus":
        positive = ~negative
    elif tie == "minus":
        negative = ~positive
    agrees = ((stack > 0) & positive) | ((stack < 0) & negative)
    voices = xp.astype(agrees, stack.dtype) * shares
    behind = _added(voices)
    empty = xp.abs(behind) <= _VANISHED * _added(xp.abs(voices))
    merged = _added(silence(stack, agrees) * shares) / (behind + xp.astype(empty, stack.dtype))
    return silence(merged, ~empty)


def _added(stack: Any) -> Any:
    # One model after the other, so that the rounding does not depend on the library.
    total = stack[0:1, :]
    for model in range(1, stack.shape[0]):
        total = total + stack[model : model + 1, :]
    return total
