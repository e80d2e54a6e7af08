"""What an op does, described so that a kernel can do it: stages of a fused chain.

An op declares its stages by ``fused``, a function of its place and parameters. They are plain
values and know nothing of how they are run; what has no stages is run by the op itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mergebench.compute.gram import is_even
from mergebench.compute.select import Cut

T = TypeVar("T")


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


Stage = Window | Draw | Multiply | Divide | Elect | Add | Step | Disjoint
Stages = tuple[Stage, ...]
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
    windows = [each for each in stages if isinstance(each, Window)]
    draws = [each for each in stages if isinstance(each, Draw)]
    products = [each for each in stages if isinstance(each, Multiply)]
    quotients = [each for each in stages if isinstance(each, Divide)]
    count = len(stages)
    if len(windows) == count and len({bool(each.drop) for each in windows}) == 1:
        return Window(_all(each.keep for each in windows), _all(each.drop for each in windows))
    if len(draws) == count:
        return Draw(_all(each.streams for each in draws), _all(each.limits for each in draws))
    if len(products) == count:
        return Multiply(_all(each.by for each in products))
    return Divide(_all(each.by for each in quotients)) if len(quotients) == count else None


def _all(parts: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(each for part in parts for each in part)


def combination(shares: Any, pivot: int) -> Stages:
    """What :func:`mergebench.compute.gram.combined` does with shares of whole models, (n,)."""
    parts = tuple(float(each) for each in shares)
    if not is_even(shares):
        return (Add(parts),)
    towards = tuple(model for model in range(len(parts)) if model != pivot)
    return (Step(pivot, towards, tuple(parts[model] for model in towards), exact=False),)
