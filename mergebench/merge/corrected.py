"""Chains that correct a combined update by a low rank: they keep low-rank inputs factored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mergebench.core.tensor import Array
from mergebench.merge.at import Corrected
from mergebench.merge.chains import coefficients, combines
from mergebench.merge.item import Item
from mergebench.merge.op import Chain, Op

Pair = tuple[Array, Array]


def begins_at(ops: Chain) -> int | None:
    """The place of the first op that corrects; ``None`` where the chain cannot be run in factors.

    Before it stand linear ops that leave a single update, behind it linear ones and others that
    correct.
    """
    places = [place for place, op in enumerate(ops) if _corrects(op)]
    if not places or not all(op.linear or _corrects(op) for op in ops):
        return None
    return places[0] if combines(ops[: places[0]]) else None


def corrects(ops: Chain) -> bool:
    """Whether :func:`corrected` gives what the chain makes of low-rank inputs."""
    return begins_at(ops) is not None


def added_rank(ops: Chain, shape: tuple[int, int]) -> int:
    """The most rank that the chain adds to that of its inputs, matrices of a shape."""
    return sum(op.spec.added_rank(shape, **dict(op.params)) for op in ops)


def corrected(pair: Pair, ops: Chain, item: Item, values: Mapping[Chain, object]) -> Pair:
    """``(B, A)`` of an update that the ops from :func:`begins_at` on have worked on.

    Parameters
    ----------
    pair : float64 arrays, (out, r) and (r, in)
        What the ops before have made.
    ops : Chain
    item : Item
    values : mapping of (ops up to the one that asked) to what was measured
    """
    left, right = pair
    begin = begins_at(ops)
    assert begin is not None
    for end, op in enumerate(ops[begin:], start=begin + 1):
        if not _corrects(op):
            (share,) = coefficients((op,), item.site, (1.0,))
            left = left * share
            continue
        assert op.spec.correction is not None
        made: Corrected = op.spec.correction(values.get(ops[:end]), **dict(op.params))
        left = left * made.scale
        if made.left is not None and made.left.size:
            left = np.concatenate([left, made.left], axis=1)
            right = np.concatenate([right, made.right], axis=0)
    return left, right


def _corrects(op: Op) -> bool:
    return op.spec.correction is not None and not op.linear
