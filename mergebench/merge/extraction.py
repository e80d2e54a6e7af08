"""Adapters from full models: what is factored, what is written in full, what is left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from mergebench.core.delta import Difference, LowRank
from mergebench.core.site import Site
from mergebench.core.tensor import Tensor, size_of
from mergebench.merge.align import Aligned
from mergebench.merge.chains import rank_of
from mergebench.merge.item import Item
from mergebench.merge.partition import selected
from mergebench.merge.variants import Variant
from mergebench.recipe import Recipe

_PIECE = 1 << 20


def for_adapter(aligned: Aligned, variants: Sequence[Variant], recipe: Recipe) -> Aligned:
    """What an adapter holds: low-rank updates, and new values of what has no low-rank form.

    Full models change norms and biases beside matrices: these get the base added, and so does what
    ``recipe.whole`` selects. Where a rank or an energy is asked for, matrices of full models are
    truncated to it, and modules that no model has changed are left out.

    Raises
    ------
    ParameterError
        If a selector matches no tensor.
    """
    whole: set[str] = set()
    if recipe.whole:
        sites = {name: item.site for name, item in aligned.items.items()}
        tied = [{name, *twins} for name, twins in aligned.twins.items()]
        whole = selected(sites, tied, recipe.whole, (), "whole")
    asked = recipe.rank is not None or recipe.energy is not None
    items = {
        name: replace(item, base=item.origin)
        if name in whole or _has_no_factors(item, variants, asked=asked)
        else item
        for name, item in aligned.items.items()
    }
    still = _unchanged(items) if asked else frozenset()
    if len(still) == len(items):
        still = frozenset()
    left = f"{len(still)} tensors are as in the base and left out: {', '.join(sorted(still)[:3])}"
    return replace(
        aligned,
        items={name: item for name, item in items.items() if name not in still},
        order=tuple(name for name in aligned.order if name not in still),
        twins={name: twins for name, twins in aligned.twins.items() if name not in still},
        notes=(*aligned.notes, *([left] if still else [])),
    )


def is_low(item: Item) -> bool:
    """Whether every input has factors."""
    return all(delta is None or isinstance(delta, LowRank) for delta in item.deltas)


def is_bounded(item: Item, variants: Sequence[Variant]) -> bool:
    """Whether every chain leaves a low rank of any input."""
    shape, count = item.site.shape, len(item.deltas)
    limits = [rank_of(each.at(item.site.name), count, shape) for each in variants]
    return len(shape) > 1 and None not in limits


def is_layer(site: Site) -> bool:
    """Whether a tensor is a matrix or a convolution, which any adapter can hold the factors of."""
    return len(site.shape) == 2 or (len(site.shape) > 2 and site.kind == "conv")


def _has_no_factors(item: Item, variants: Sequence[Variant], *, asked: bool) -> bool:
    if is_low(item) or is_bounded(item, variants):
        return False
    # Without a rank to truncate to, a matrix is an error further on.
    return not is_layer(item.site) if asked else len(item.site.shape) != 2


def _unchanged(items: dict[str, Item]) -> frozenset[str]:
    """Tensors of modules of which no model has changed any tensor."""
    modules: dict[str, list[str]] = {}
    for name in items:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return frozenset(
        name for names in modules.values() if _are_equal(items[n] for n in names) for name in names
    )


def _are_equal(items: Iterable[Item]) -> bool:
    return all(
        delta is None or (isinstance(delta, Difference) and _same(delta.finetuned, delta.base))
        for item in items
        for delta in item.deltas
    )


def _same(one: Tensor, two: Tensor) -> bool:
    size = size_of(one.shape)
    for start in range(0, size, _PIECE):
        stop = min(start + _PIECE, size)
        if not np.array_equal(one.read(start, stop), two.read(start, stop)):
            return False
    return True
