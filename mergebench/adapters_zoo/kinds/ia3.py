"""(IA)³: rows, or columns, of the weight multiplied by a learned vector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lazy import Mapped
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import Adapted, adapted_modules, claimed, whole
from mergebench.adapters_zoo.on_base import base_names, displaced, misfit
from mergebench.core.delta import Delta, Dense
from mergebench.core.tensor import Array

_ROLES = ("ia3_l",)


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    modules = adapted_modules(source, _ROLES)
    names = base_names(source, options, modules, "(IA)³")
    settings = read_settings(source)
    deltas: dict[str, Delta] = {}
    for module in modules.values():
        stored = whole(source, module, "ia3_l")
        factors, columns = stored.reshape(-1), _scales_inputs(source, module, stored.shape)
        flipped = for_module(settings, module.name).fan_in_fan_out
        change = partial(_scaled, source, module, factors, columns)
        name, delta = displaced(source, options, names, module, change, flipped=flipped)
        put(source.label, deltas, name, module.key, delta)
        bias = name.removesuffix("weight") + "bias"
        assert options.base is not None
        if not columns and bias in options.base and name != bias:
            vector = options.base[bias]
            if vector.shape != factors.shape:
                raise misfit(source, module, f"{vector.shape} of {bias}", str(factors.shape))
            put(source.label, deltas, bias, module.key, Dense(Mapped(vector, _times(factors - 1))))
    return deltas


def _scales_inputs(source: AdapterSource, module: Adapted, shape: tuple[int, ...]) -> bool:
    """Whether the vector multiplies inputs (feed-forward modules), rather than outputs."""
    config = source.config or {}
    listed = config.get("feedforward_modules") or []
    if isinstance(listed, list) and listed:
        return any(module.name == each or module.name.endswith(f".{each}") for each in listed)
    return len(shape) == 2 and shape[0] == 1 and shape[1] > 1


def _scaled(
    source: AdapterSource,
    module: Adapted,
    factors: Array,
    columns: bool,
    weight: Block,
    rows: int,
    width: int,
) -> Block:
    size = width if columns else rows
    if columns and factors.size != size and size % max(factors.size, 1) == 0 and factors.size:
        # One factor for each input channel of a convolution.
        factors = np.repeat(factors, size // factors.size)
    if factors.size != size:
        raise misfit(source, module, f"{size} factors", str(factors.size))
    less = factors - 1

    def block(row: slice, column: slice) -> Array:
        return np.asarray(weight(row, column) * (less[column] if columns else less[row, None]))

    return block


def _times(factors: Array) -> Callable[[Array, slice], Array]:
    return lambda values, place: values * factors[place]


KINDS.add(
    "ia3",
    Kind(
        name="ia3",
        formula="ΔW = (l - 1) ∘ W by rows (and the bias), or by columns in feed-forward modules",
        detect=_detect,
        read=_read,
        notes="(IA)³, arXiv:2205.05638. Needs the base.",
        peft_types=frozenset({"IA3"}),
    ),
)
