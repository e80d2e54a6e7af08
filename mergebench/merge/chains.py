"""Chains of ops: what they are as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mergebench.core.errors import ParameterError
from mergebench.core.site import Site
from mergebench.merge.at import At, Collects, Stack
from mergebench.merge.op import Chain, Granularity, Op, Sides


def chain(*ops: Op) -> Chain:
    """A chain, checked for the order of its ops.

    Raises
    ------
    ParameterError
        If an op that needs several models stands after one that leaves a single one.
    """
    reduced = ""
    for each in ops:
        spec = each.spec
        if reduced and (spec.reduces or spec.apart == "each"):
            raise ParameterError(
                f"{each.name}: nothing left to combine, {reduced} has left a single task vector",
                fix="use one combining op per chain",
            )
        reduced = each.name if spec.reduces else "" if spec.apart else reduced
    return ops


def combines(ops: Chain) -> bool:
    """Whether the chain leaves a single task vector, not one for each model."""
    single = False
    for each in ops:
        single = not each.spec.apart and (single or each.spec.reduces)
    return single


def is_apart(ops: Chain) -> bool:
    """Whether the chain gives every model a result of its own."""
    return not combines(ops) and any(each.spec.apart for each in ops)


def check_models(ops: Chain, weights: Sequence[float]) -> None:
    """Refuse models that are too many for an op of the chain, or weights that it cannot take.

    Raises
    ------
    ParameterError
    """
    given = weights
    for each in ops:
        most = each.spec.most
        if most is not None and len(weights) > most:
            raise ParameterError(
                f"{each.name}: number of models", got=str(len(weights)), expected=f"at most {most}"
            )
        if each.spec.check_weights is not None:
            each.spec.check_weights(weights, **dict(each.params))
        weights = given if each.spec.apart else (1.0,) if each.spec.reduces else weights


def needs_base(ops: Iterable[Op]) -> bool:
    """Whether an op of the chain looks at the base's entries."""
    return any(each.spec.needs_base for each in ops)


def collects_of(ops: Iterable[Op]) -> Collects | None:
    """What the chain needs to have been collected of every model; ``None`` for nothing."""
    return next((each.collects for each in ops if each.collects is not None), None)


def without_collected(ops: Chain) -> Chain:
    """The chain for tensors that nothing was collected of.

    It is the same where a later op looks at the whole model, for which all chains begin alike.
    """
    behind = [place for place, each in enumerate(ops) if each.collects is not None]
    later = [each.statistic for each in ops[behind[0] + 1 :]] if behind else []
    if any(each is not None and each.scope == "model" for each in later):
        return ops
    return tuple(each if (wanted := each.collects) is None else wanted.otherwise() for each in ops)


def is_linear(ops: Chain) -> bool:
    """Whether the whole chain is a weighted sum with weights that depend on the site alone."""
    return all(each.linear for each in ops)


def sides_of(ops: Chain) -> Sides:
    """Where the whole chain commutes with changes of basis.

    An op that measures something first sees entries, so a chain with one does nowhere.
    """
    if any(each.statistic is not None or each.sides == "none" for each in ops):
        return "none"
    return "left" if any(each.sides == "left" for each in ops) else "both"


def workspace_of(ops: Chain, models: int, shape: tuple[int, int]) -> int:
    """The most bytes that an op of the chain holds beside its stack, for one matrix."""
    most, rows = 0, models
    for each in ops:
        if each.spec.workspace is not None:
            most = max(most, each.spec.workspace(rows, *shape))
        rows = models if each.spec.apart else 1 if each.spec.reduces else rows
    return most


def rank_of(ops: Chain, models: int, shape: tuple[int, ...]) -> int | None:
    """The largest rank that a merged tensor of a shape can have, as a matrix.

    ``None`` where the chain sets no limit.
    """
    most: int | None = None
    rows = models
    for each in ops:
        # Only what does not depend on the basis leaves ranks where they are.
        most = None if each.sides == "none" or each.spec.apart or most is None else most
        if each.spec.reduces and most is not None and not each.spec.chooses:
            most *= rows
        own = each.spec.rank(shape, models, **dict(each.params))
        most = own if most is None else most if own is None else min(own, most)
        rows = models if each.spec.apart else 1 if each.spec.reduces else rows
    return most


def tolerance_of(ops: Chain) -> float:
    """The relative error that another backend may show; 0 where all agree within a rounding."""
    return max((each.spec.tolerance for each in ops), default=0.0)


def coefficients(
    ops: Chain, site: Site, weights: Sequence[float], places: tuple[int, ...] = ()
) -> tuple[float, ...]:
    """The weight that a linear chain gives to each model at ``site``.

    ``places`` are those of :class:`At`.
    """
    count = len(weights)
    stack: Stack = np.eye(count)
    at = At(site, 0, count, tuple(weights), places=places)
    for each in ops:
        stack = each.apply(stack, at)
    return tuple(float(x) for x in np.asarray(stack).reshape(-1))


def granularity_of(ops: Chain) -> Granularity:
    """The coarsest granularity in a chain."""
    order: tuple[Granularity, ...] = ("entry", "row", "tensor")
    return max((each.granularity for each in ops), key=order.index, default="entry")
