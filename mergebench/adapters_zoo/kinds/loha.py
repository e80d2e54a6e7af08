"""LoHa: the Hadamard product of two low-rank products, in PEFT's and in LyCORIS' names."""

from __future__ import annotations

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block, Computed
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import (
    Adapted,
    adapted_modules,
    claimed,
    scaling,
    settle,
    whole,
    wide,
)
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import MismatchError
from mergebench.core.tensor import Array

_ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    settings = read_settings(source, alpha="alpha")
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    deltas: dict[str, Delta] = {}
    for module in adapted_modules(source, _ROLES).values():
        sides = [_side(source, module, number) for number in (1, 2)]
        if sides[0][1:] != sides[1][1:]:
            raise MismatchError(
                f"{source.label}: the two products of {module.name} differ in shape",
                got=f"{sides[0][1]}×{sides[0][2]} and {sides[1][1]}×{sides[1][2]}",
            )
        rank = sides[0][3]
        scale = scaling(source, module, rank, settings, options)
        flipped = for_module(settings, module.name).fan_in_fan_out
        name, place = settle(
            source, options, names, module, sides[0][1], sides[0][2], flipped=flipped
        )
        block = _hadamard(sides[0][0], sides[1][0], scale)
        values = Computed(place.shape, block, place.transposed, wide(source, module))
        put(source.label, deltas, name, module.key, Dense(values))
    return deltas


def _side(source: AdapterSource, module: Adapted, number: int) -> tuple[Block, int, int, int]:
    """One product: its blocks, rows, columns and rank."""
    left, right = (whole(source, module, f"hada_w{number}_{side}") for side in "ab")
    if f"hada_t{number}" not in module.keys:
        left, right = left.reshape(left.shape[0], -1), right.reshape(right.shape[0], -1)
        _check(source, module, left.shape[1], right.shape[0])
        return _product(left, right), left.shape[0], right.shape[1], right.shape[0]
    # A Tucker core (r, r, *kernel), with factors (r, out) and (r, in).
    core = whole(source, module, f"hada_t{number}")
    _check(source, module, left.shape[0], core.shape[0])
    _check(source, module, right.shape[0], core.shape[1])
    inner = np.einsum("ijk,jn->ink", core.reshape(*core.shape[:2], -1), right)
    block = _product(left.T, inner.reshape(left.shape[0], -1))
    return block, left.shape[1], inner[0].size, right.shape[0]


def _check(source: AdapterSource, module: Adapted, one: int, two: int) -> None:
    if one != two:
        raise MismatchError(
            f"{source.label}: the factors of {module.name} do not fit each other",
            got=f"ranks {one} and {two}",
        )


def _product(left: Array, right: Array) -> Block:
    return lambda rows, columns: np.asarray(left[rows] @ right[:, columns])


def _hadamard(one: Block, two: Block, scale: float) -> Block:
    return lambda rows, columns: one(rows, columns) * two(rows, columns) * scale


KINDS.add(
    "loha",
    Kind(
        name="loha",
        formula="ΔW = (α/r) · (B₁ A₁) ∘ (B₂ A₂)",
        detect=_detect,
        read=_read,
        notes="LoHa (FedPara, arXiv:2108.06098). Linear and convolution, with Tucker cores; PEFT's "
        "and LyCORIS' names.",
        peft_types=frozenset({"LOHA"}),
    ),
)
