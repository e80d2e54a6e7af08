"""DoRA: a LoRA whose result is scaled to a learned magnitude."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block, Computed
from mergebench.adapters_zoo.modules import Adapted, adapted_modules, claimed, whole, wide
from mergebench.adapters_zoo.on_base import base_names, blocks_of, misfit, weight_of
from mergebench.core.delta import Delta, Dense, LowRank, factors
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import Array

_ROLES = ("lora_magnitude_vector", "dora_scale")
_STEP = 256


def _parts(source: AdapterSource) -> tuple[AdapterSource, dict[str, Adapted]]:
    """The adapter without its magnitudes, which is a LoRA, and the modules that have one."""
    modules = {
        name: Adapted(name, {r: k for r, k in each.keys.items() if r in _ROLES}, each.flat)
        for name, each in adapted_modules(source, _ROLES).items()
    }
    ours = claimed(modules)
    tensors = {key: tensor for key, tensor in source.tensors.items() if key not in ours}
    config = source.config
    if config is not None:
        config = {key: value for key, value in config.items() if key != "use_dora"}
    return replace(source, tensors=tensors, config=config), modules


def _detect(source: AdapterSource) -> frozenset[str]:
    lora, modules = _parts(source)
    if not modules:
        return frozenset()
    return claimed(modules) | KINDS["lora"].detect(lora)


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    lora, modules = _parts(source)
    names = base_names(source, options, modules, "DoRA")
    if source.config is not None and source.config.get("use_dora", True) is False:
        raise MismatchError(
            f"{source.label}: holds magnitudes ({min(each.key for each in modules.values())}), but "
            "adapter_config.json says use_dora false",
            fix="correct the one that is wrong",
        )
    deltas = dict(KINDS["lora"].read(lora, options))
    plain = {name for name, delta in deltas.items() if isinstance(delta, LowRank)}
    for module in modules.values():
        name, weight = weight_of(source, options, names, module)
        delta = deltas.get(name)
        if not isinstance(delta, LowRank):
            raise FormatError(f"{source.label}: {module.key} has no LoRA beside it")
        (role,) = module.keys
        magnitude = whole(source, module, role)
        left, right = factors(delta, np.dtype(np.float64))
        if delta.transposed:
            left, right = right.T, left.T
        rows, columns = left.shape[0], right.shape[1]
        by_rows = role == _ROLES[0] or magnitude.shape[0] == rows
        flat = magnitude.reshape(-1)
        if flat.size != (rows if by_rows else columns):
            raise misfit(source, module, f"{rows if by_rows else columns} entries", str(flat.size))
        base = blocks_of(weight, transposed=delta.transposed)
        block = _scaled(base, left, right, flat, by_rows)
        dtype = "F64" if "F64" in (weight.dtype, wide(source, module)) else "F32"
        deltas[name] = Dense(Computed(delta.shape, block, delta.transposed, dtype))
        plain.discard(name)
    if plain and source.config is not None:
        raise FormatError(
            f"{source.label}: use_dora is set, and {min(plain)} has no magnitudes",
            expected="a lora_magnitude_vector for every adapted module",
        )
    return deltas


def _scaled(base: Block, left: Array, right: Array, magnitude: Array, by_rows: bool) -> Block:
    """``m ∘ V / ‖V‖ - W`` with ``V = W + B A``, norms over rows or over columns."""
    norms = _norms(base, left, right, by_rows)

    def block(rows: slice, columns: slice) -> Array:
        weight = base(rows, columns)
        moved = weight + left[rows] @ right[:, columns]
        lengths = norms()
        place = rows if by_rows else columns
        ratio = magnitude[place] / lengths[place]
        return np.asarray(moved * (ratio[:, None] if by_rows else ratio) - weight)

    return block


def _norms(base: Block, left: Array, right: Array, by_rows: bool) -> Callable[[], Array]:
    """Norms of the rows or columns of ``W + B A``, computed when first asked for."""

    @cache
    def norms() -> Array:
        squares = np.zeros(left.shape[0] if by_rows else right.shape[1])
        every = slice(0, right.shape[1])
        for start in range(0, left.shape[0], _STEP):
            rows = slice(start, min(start + _STEP, left.shape[0]))
            moved = base(rows, every) + left[rows] @ right
            if by_rows:
                squares[rows] = (moved * moved).sum(1)
            else:
                squares += (moved * moved).sum(0)
        lengths = np.sqrt(squares)
        # A row of zeros stays one.
        return np.where(lengths == 0, 1.0, lengths)

    return norms


KINDS.add(
    "dora",
    Kind(
        name="dora",
        formula="ΔW = m ∘ (W + s B A) / ‖W + s B A‖ - W, norms of rows",
        detect=_detect,
        read=_read,
        notes="DoRA, arXiv:2402.09353; PEFT's and LyCORIS' names (dora_scale of shape (1, in) has "
        "norms of columns). Needs the base.",
        peft_types=frozenset({"LORA"}),
    ),
)
