"""Compete: weigh every entry by its importance within and between tasks (PCB-Merging)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from mergebench.compute.namespace import as_numpy, namespace
from mergebench.compute.scores import Mapped, extremes, kth_smallest
from mergebench.compute.sums import totals
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.op import op

Variant = Literal["code", "paper"]
Known = dict[str, NDArray[Any]]


def _unit(values: Stack, low: Stack, high: Stack) -> Stack:
    """Values from [low, high] to [0, 1], row by row; 0 where there is nothing between."""
    xp = namespace(values)
    width = high - low
    empty = xp.astype(width == 0, values.dtype)
    return (values - low[:, None]) / (width + empty)[:, None]


def _wide(stack: Stack) -> Stack:
    return namespace(stack).astype(stack, namespace(stack).float64)


def _there(known: Known, stack: Stack) -> dict[str, Stack]:
    """Measured numbers as arrays beside the stack."""
    xp = namespace(stack)
    return {name: xp.asarray(array, device=stack.device) for name, array in known.items()}


def _added(stack: Stack) -> Stack:
    total = stack[0:1, :]
    for model in range(1, stack.shape[0]):
        total = total + stack[model : model + 1, :]
    return total


def _clipped(magnitudes: Stack, known: dict[str, Stack]) -> Stack:
    xp = namespace(magnitudes)
    return xp.minimum(xp.maximum(magnitudes, known["low"][:, None]), known["high"][:, None])


def _scores_of_code(stack: Stack, known: dict[str, Stack]) -> Stack:
    """exp(N · minmax(|τ̂|)²) · tanh(τ · Σ τ), up to a factor that normalising takes out."""
    xp = namespace(stack)
    count = stack.shape[0]
    share = _unit(_clipped(xp.abs(stack), known), known["low"], known["high"])
    return xp.exp(count * (share * share - 1)) * xp.tanh(stack * _added(stack))


def _products(stack: Stack) -> Stack:
    """τ_i ⊙ τ_j for all ordered pairs, (n², m)."""
    xp = namespace(stack)
    return xp.concat([stack[i : i + 1, :] * stack for i in range(stack.shape[0])], axis=0)


def _exponentials(stack: Stack, known: dict[str, Stack]) -> Stack:
    """What the softmaxes of the paper divide: of N · norm(τ_i²), then of norm(τ_i ⊙ τ_j)."""
    xp = namespace(stack)
    count = stack.shape[0]
    pairs = _unit(_products(stack), known["low"], known["high"])
    own = xp.stack([pairs[i * (count + 1), :] for i in range(count)])
    return xp.concat([xp.exp(count * (own - 1)), xp.exp(pairs)], axis=0)


def _scores_of_paper(stack: Stack, known: dict[str, Stack]) -> Stack:
    """softmax(N · norm(τ_i²)) · Σ_j softmax(norm(τ_i ⊙ τ_j)), times the squared size."""
    xp = namespace(stack)
    count = stack.shape[0]
    sums = known["sums"]
    shares = _exponentials(stack, known) / (sums + xp.astype(sums == 0, sums.dtype))[:, None]
    rows = [
        shares[i : i + 1, :] * _added(shares[count * (i + 1) : count * (i + 2), :])
        for i in range(count)
    ]
    return xp.concat(rows, axis=0) * known["size"] ** 2


def _scores(stack: Stack, known: dict[str, Stack], variant: Variant) -> Stack:
    return _scores_of_code(stack, known) if variant == "code" else _scores_of_paper(stack, known)


def _ranked(scores: Stack, variant: Variant) -> Stack:
    """Scores as they are ranked.

    A mask changes at once where two scores swap, so that those that differ by rounding alone must
    be equal; what is normalised fades in from zero.
    """
    xp = namespace(scores)
    if variant == "code":
        return scores
    return xp.astype(xp.astype(scores, xp.float32), xp.float64)


def _magnitudes(stack: Stack) -> NDArray[Any]:
    return np.abs(as_numpy(_wide(stack)))


def _measure(sweep: Sweep, ratio: float, clip: float, variant: Variant) -> Known:
    size, count = sweep.size, sweep.models
    if size == 0:
        return {}
    known: Known
    if variant == "code":
        sizes = Mapped(sweep, _magnitudes, count)
        last = max(int(size * (1 - clip) - 1), 0)
        known = {
            "low": kth_smallest(sizes, [min(int(size * clip), size - 1)] * count),
            "high": kth_smallest(sizes, [last] * count),
        }
    else:
        pairs = Mapped(sweep, lambda stack: as_numpy(_products(_wide(stack))), count * count)
        low, high = extremes(pairs)
        known = {"low": low, "high": high, "size": np.array(float(size))}

        def terms(stack: Stack, at: At) -> Stack:
            return _exponentials(_wide(stack), _there(known, stack))

        known["sums"] = as_numpy(totals(sweep, terms, count + count * count))

    def ranked(stack: Stack) -> NDArray[Any]:
        scores = _scores(_wide(stack), _there(known, stack), variant)
        return as_numpy(_ranked(scores, variant))

    scores = Mapped(sweep, ranked, count)
    known["bar"] = kth_smallest(scores, [min(int(size * (1 - ratio)), size - 1)] * count)
    known["top"] = extremes(scores)[1]
    return known


def _statistic(ratio: float, clip: float, variant: Variant, normalize: bool) -> Statistic:
    return Statistic("model", partial(_measure, ratio=ratio, clip=clip, variant=variant))


@op(statistic=_statistic, reduces=True)
def compete(
    stack: Stack,
    at: At,
    ratio: Annotated[float, Interval(gt=0, le=1)] = 0.1,
    clip: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0001,
    variant: Variant = "code",
    normalize: bool = True,
) -> Stack:
    """Weigh every entry by how much it matters within its task and to the others, then average.

    Weights of models multiply what is averaged, and take no part in the scores.

    Parameters
    ----------
    ratio : float in (0, 1], default 0.1
        Share of entries of each task that count, over the whole model.
    clip : float in [0, 0.5), default 0.0001
        With ``code``, magnitudes are clipped to the quantiles clip and 1 - clip of their task.
    variant : code or paper, default code
        Scores ``exp(N minmax(|τ̂|)²) · tanh(τ · Σ τ)``, of which what exceeds the bar of ``ratio``
        is normalised to [0, 1]; or ``softmax(N norm(τ²)) · Σ_j softmax(norm(τ τ_j))`` of the
        entries at or above the bar.
    normalize : true or false, default true
        Divide by the sum of the scores. Without it the largest score is 1: of each task with
        ``code``, of all tasks with ``paper``.
    """
    xp = namespace(stack)
    if not at.value:
        return stack[0:1, :]
    known, wide = _there(at.value, stack), _wide(stack)
    scores = _scores(wide, known, variant)
    bar, top = known["bar"][:, None], known["top"][:, None]
    counts = xp.astype(_ranked(scores, variant) >= bar, xp.float64)
    if variant == "code":
        # Where all that count are equal there is nothing to normalise: each counts in full.
        flat = xp.astype(bar == top, xp.float64)
        scores = counts * ((scores - bar + flat) / (top - bar + flat))
        wide = xp.sign(wide) * _clipped(xp.abs(wide), known)
    else:
        # Softmaxes are as small as the model is large.
        scores = counts * scores / (xp.max(top) + xp.astype(xp.max(top) == 0, xp.float64))
    shares = xp.asarray(at.weights, dtype=xp.float64, device=stack.device)[:, None]
    if normalize:
        behind = _added(scores)
        scores = scores / (behind + xp.astype(behind == 0, xp.float64))
    return xp.astype(_added(wide * scores * shares), stack.dtype)
