"""HRA: the inputs of a weight reflected by a chain of Householder reflections."""

from __future__ import annotations

from functools import partial

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import Adapted, adapted_modules, check_rank, claimed, matrix
from mergebench.adapters_zoo.on_base import base_names, displaced, misfit
from mergebench.core.delta import Delta
from mergebench.core.errors import FormatError
from mergebench.core.tensor import Array

_ROLES = ("hra_u",)


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    modules = adapted_modules(source, _ROLES)
    names = base_names(source, options, modules, "HRA")
    settings = read_settings(source)
    orthogonal = bool((source.config or {}).get("apply_GS"))
    deltas: dict[str, Delta] = {}
    for module in modules.values():
        vectors = matrix(source, module, "hra_u")
        check_rank(source, module, settings, vectors.shape[1])
        units = _directions(source, module, vectors, orthogonal)
        flipped = for_module(settings, module.name).fan_in_fan_out
        change = partial(_reflected, source, module, units)
        name, delta = displaced(source, options, names, module, change, flipped=flipped)
        put(source.label, deltas, name, module.key, delta)
    return deltas


def _directions(source: AdapterSource, module: Adapted, vectors: Array, orthogonal: bool) -> Array:
    """The columns at length 1; each one freed of those before it where ``orthogonal``."""
    found: list[Array] = []
    for vector in vectors.T:
        rest = vector
        for unit in found if orthogonal else ():
            rest = rest - (unit @ rest) * unit
        length = np.linalg.norm(rest)
        if not length:
            raise FormatError(f"{source.label}: {module.key} has a direction of length zero")
        found.append(rest / length)
    return np.stack(found, axis=1)


def _reflected(
    source: AdapterSource, module: Adapted, units: Array, weight: Block, rows: int, columns: int
) -> Block:
    if units.shape[0] != columns:
        raise misfit(source, module, f"{columns} inputs", str(units.shape[0]))

    def block(row: slice, column: slice) -> Array:
        part = weight(row, slice(0, columns))
        turned = part
        for unit in units.T:
            turned = turned - 2 * np.outer(turned @ unit, unit)
        return np.asarray((turned - part)[:, column])

    return block


KINDS.add(
    "hra",
    Kind(
        name="hra",
        formula="ΔW = W H₁ … H_r - W, H_i = I - 2 u_i u_iᵀ",
        detect=_detect,
        read=_read,
        notes="HRA, arXiv:2405.17484. Needs the base.",
        peft_types=frozenset({"HRA"}),
    ),
)
