"""Adapters out: the factors of a merged update."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mergebench.compute.decompose import (
    singular_values_of,
    spectrum_of_product,
    truncate,
    truncate_product,
)
from mergebench.compute.rounding import round_to
from mergebench.core.delta import LowRank, factors
from mergebench.core.tensor import DTYPES, Array
from mergebench.merge.chains import coefficients, granularity_of, is_linear, needs_base
from mergebench.merge.core_space import fits, merged_factors
from mergebench.merge.corrected import begins_at, corrected
from mergebench.merge.extraction import is_low
from mergebench.merge.item import Item, load, located, nonfinite, opened
from mergebench.merge.op import Chain
from mergebench.merge.stacked import stacked
from mergebench.merge.stream import Evaluator

if TYPE_CHECKING:
    from mergebench.merge.lora_layout import Module
    from mergebench.merge.plan import Plan
    from mergebench.merge.variants import Variant


class _Sink(Protocol):
    def write(self, name: str, byte_start: int, data: Array) -> None: ...


def write_factors(
    plan: Plan, evaluator: Evaluator, variant: Variant, item: Item, sink: _Sink
) -> float | None:
    """Write B and A of one merged module.

    A linear chain concatenates the factors of its inputs, one that corrects its result by a low
    rank adds those of the correction, and a chain that commutes with changes of basis is run in
    bases of their spaces: all lose nothing where the rank of the plan holds them.
    Any other result is materialised and truncated to the summed rank.

    Returns
    -------
    float or None
        The relative residual of the truncation; ``None`` where nothing is truncated.
    """
    module = plan.package.modules[item.site.name]
    ops = variant.at(item.site.name)
    if is_linear(ops) and is_low(item) and module.own_rank >= module.full_rank:
        first = next(spec for spec in module.specs if spec.role == "A")
        _write(module, *stacked(ops, item, module.rank, first.dtype, first.name), sink)
        return None
    lost = None
    pair = merged_pair(evaluator, variant, item)
    if pair is None:
        matrix = _dense(evaluator, variant, item)
        matrix = matrix.reshape(matrix.shape[0], -1)
        if module.transposed:
            matrix = matrix.T
        left, right, lost = truncate(matrix, module.own_rank)
    else:
        left, right = pair
        if module.own_rank < module.full_rank:
            left, right, lost = truncate_product(left, right, module.own_rank)
        elif not is_linear(ops):
            # Beyond the rank of the plan lies the rounding of zeros.
            left, right = left[:, : module.own_rank], right[: module.own_rank]
    wide_left = np.zeros((left.shape[0], module.rank))
    wide_left[:, : left.shape[1]] = left
    wide_right = np.zeros((module.rank, right.shape[1]))
    wide_right[: right.shape[0]] = right
    _write(module, wide_left, wide_right, sink)
    return lost


def _write(module: Module, left: Array, right: Array, sink: _Sink) -> None:
    """All tensors of a module, from factors of the rank that it has in the file."""
    for spec in module.specs:
        if spec.role == "alpha":
            sink.write(spec.name, 0, np.array(spec.constant, np.float32))
            continue
        array = right if spec.role == "A" else left
        if spec.rows:
            array = np.concatenate([array[start:stop] for start, stop in spec.rows])
        if array.dtype != DTYPES[spec.dtype]:
            array = round_to(array, spec.dtype, spec.name)
        sink.write(spec.name, 0, array)


def merged_pair(evaluator: Evaluator, variant: Variant, item: Item) -> tuple[Array, Array] | None:
    """``(B, A)`` of one merged update, nothing lost; None where it must be materialised."""
    ops = variant.at(item.site.name)
    if not is_low(item):
        return None
    if is_linear(ops):
        return _concatenate(item, ops)
    if (begin := begins_at(ops)) is not None:
        values = evaluator.measured(ops, item)
        turned = _is_transposed(item) != item.site.transposed
        left, right = _concatenate(item, ops[:begin])
        pair = (right.T, left.T) if turned else (left, right)
        left, right = corrected(pair, ops, item, values)
        return (right.T, left.T) if turned else (left, right)
    if not fits(ops, item):
        return None
    left, right = merged_factors(partial(evaluator.run, ops, item), ops, item)
    return (right.T, left.T) if _is_transposed(item) else (left, right)


def singular_values(evaluator: Evaluator, variant: Variant, item: Item) -> Array:
    """Singular values of one merged update, the largest first, float64."""
    pair = merged_pair(evaluator, variant, item)
    if pair is not None:
        values: Array = spectrum_of_product(*pair, rank=0)[1]
        return values
    matrix = _dense(evaluator, variant, item)
    return singular_values_of(matrix.reshape(matrix.shape[0], -1))


def _is_transposed(item: Item) -> bool:
    return any(isinstance(delta, LowRank) and delta.transposed for delta in item.deltas)


def _concatenate(item: Item, ops: Chain) -> tuple[Array, Array]:
    """``[c1 s1 B1 …]`` and ``[A1; …]``."""
    lefts, rights = [], []
    wide = np.dtype(np.float64)
    shares = coefficients(ops, item.site, item.weights, item.places)
    for share, delta in zip(shares, item.deltas, strict=True):
        if isinstance(delta, LowRank):
            left, right = factors(delta, wide)
            if delta.transposed:
                left, right = right.T, left.T
            if not (np.isfinite(left).all() and np.isfinite(right).all()):
                raise nonfinite(item)
            lefts.append(left * share)
            rights.append(right)
    return np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0)


def _dense(evaluator: Evaluator, variant: Variant, item: Item) -> Array:
    out = np.empty(item.site.size, item.dtype)
    ready = opened(item)
    ops = variant.at(item.site.name)
    unit = evaluator.tiling.unit(granularity_of(ops), item.site.size, item.site.row)

    def work(start: int, stop: int) -> None:
        for begin, end in evaluator.tiling.tiles(start, stop, unit):
            stack, base = load(ready, begin, end)
            at = located(ready, begin, end, base, needs_base(ops))
            out[begin:end] = evaluator.run(ops, item, at, stack)[0]

    jobs = evaluator.tiling.jobs(item.site.size, unit)
    for _ in evaluator.each_job(partial(work, start, stop) for start, stop in jobs):
        pass
    return out.reshape(item.site.shape)
