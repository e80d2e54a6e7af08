"""What an op does, described so that a kernel can do it: stages of a fused chain.

An op declares its stages by ``fused``, a function of its place and parameters. They are plain
values and know nothing of how they are run; what has no stages is run by the op itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from mergebench.compute.cut import Cut
from mergebench.compute.gram import is_even


@dataclass(frozen=True)
class Window:
    """Zero what the cuts of a model do not keep.

    Attributes
    ----------
    keep : tuple of Cut
        Per model; what they do not keep is zeroed.
    drop : tuple of Cut
        Per model; what they do keep is zeroed. Empty for nothing.
    """

    keep: tuple[Cut, ...]
    drop: tuple[Cut, ...] = ()


@dataclass(frozen=True)
class Draw:
    """Keep entries at random: those whose number of the stream is below the limit.

    Attributes
    ----------
    streams, limits : tuple of int
        Per model; a limit is at most 2^32.
    """

    streams: tuple[int, ...]
    limits: tuple[int, ...]


@dataclass(frozen=True)
class RowWindow:
    """Keep in every row the magnitudes of rank ``low < rank <= high``.

    The largest has rank 1, and the earlier of equals the lower one.

    Attributes
    ----------
    low, high : tuple of int
        Per model, or one for all.
    ties : tuple of bool
        Whether all equals of the last that stays do too.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    ties: tuple[bool, ...]


@dataclass(frozen=True)
class RowDraw:
    """Keep entries at random, and more often the larger they are in their row.

    Of n entries the one of rank r, the smallest being 0 and the later of equals lower, stays if its
    number of the stream, as a share, is below ``least + r / (n - 1) · 2 · half``.

    Attributes
    ----------
    streams : tuple of int
        Per model.
    least, half : tuple of float
        Per model.
    divide : bool
        Whether what stays is divided by its own probability.
    """

    streams: tuple[int, ...]
    least: tuple[float, ...]
    half: tuple[float, ...]
    divide: bool


@dataclass(frozen=True)
class Multiply:
    """Multiply by one number, or by one for each model."""

    by: tuple[float, ...]


@dataclass(frozen=True)
class Divide:
    """Divide by one number, or by one for each model."""

    by: tuple[float, ...]


@dataclass(frozen=True)
class Elect:
    """Zero every value whose sign is not the elected one of its entry.

    Attributes
    ----------
    rule : mass or count
    weights : tuple of float
        What votes are multiplied by; empty where they are not.
    tie : int
        The sign of an entry whose sum is zero: 1, -1, or 0 for none.
    """

    rule: Literal["mass", "count"]
    weights: tuple[float, ...]
    tie: int


@dataclass(frozen=True)
class Add:
    """Models become one: their weighted sum, in their order; one weight stands for all."""

    weights: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Step:
    """Models become one: from one of them a step towards others, by their shares.

    Attributes
    ----------
    pivot : int
    towards : tuple of int
        Models, in the order in which they are added.
    shares : tuple of float
        Of those models.
    exact : bool
        Whether an entry of which the step is zero keeps its bits, a negative zero's too.
    """

    pivot: int
    towards: tuple[int, ...]
    shares: tuple[float, ...]
    exact: bool


@dataclass(frozen=True)
class Disjoint:
    """Models become one: the weighted sum divided by what stands behind it.

    Attributes
    ----------
    weights : tuple of float
        Per model.
    divisor : count, weights or none
    cancelled : zero or sum
    """

    weights: tuple[float, ...]
    divisor: Literal["count", "weights", "none"]
    cancelled: Literal["zero", "sum"]


Stage = Window | Draw | RowWindow | RowDraw | Multiply | Divide | Elect | Add | Step | Disjoint
Stages = tuple[Stage, ...]
#: Those that must see whole rows.
OF_ROWS = (RowWindow, RowDraw)
#: Those that treat every model by itself; what they have of each is in tuples.
_ALONE = (Window, Draw, RowWindow, RowDraw, Multiply, Divide)
#: Those that leave a single model.
REDUCING = (Add, Step, Disjoint)


def side_by_side(several: Sequence[Stages]) -> Stages | None:
    """One description from those of single models; ``None`` where they are not alike."""
    if len({len(each) for each in several}) > 1:
        return None
    joined = [_joined(each) for each in zip(*several, strict=True)]
    return None if None in joined else tuple(stage for stage in joined if stage is not None)


def _joined(stages: Sequence[Stage]) -> Stage | None:
    """The same stage for several models, each with its numbers."""
    kind = type(stages[0])
    if kind not in _ALONE or any(type(each) is not kind for each in stages):
        return None
    joined: dict[str, Any] = {}
    for each in fields(kind):
        own = [getattr(stage, each.name) for stage in stages]
        if not isinstance(own[0], tuple):
            if any(value != own[0] for value in own):
                return None
            joined[each.name] = own[0]
        elif len({bool(values) for values in own}) > 1:
            return None
        else:
            joined[each.name] = tuple(value for values in own for value in values)
    return kind(**joined)


def combination(shares: Any, pivot: int) -> Stages:
    """What :func:`mergebench.compute.gram.combined` does with shares of whole models, (n,)."""
    parts = tuple(float(each) for each in shares)
    if not is_even(shares):
        return (Add(parts),)
    towards = tuple(model for model in range(len(parts)) if model != pivot)
    return (Step(pivot, towards, tuple(parts[model] for model in towards), exact=False),)
