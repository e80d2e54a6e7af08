"""MiSS, and Bone as it was called before: one small matrix, repeated over groups of inputs."""

from __future__ import annotations

from functools import partial

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import (
    Adapted,
    adapted_modules,
    check_rank,
    claimed,
    matrix,
    settle,
    whole,
)
from mergebench.adapters_zoo.on_base import base_names, displaced, misfit
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, LowRank
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import Array, ArrayTensor

_ROLES = ("miss_block", "bone_block")


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    form = (source.config or {}).get("init_weights")
    if form not in (None, True, False, "bat", "mini"):
        raise FormatError(
            f"{source.label}: init_weights of MiSS",
            expected="true, false, bat or mini",
            got=repr(form),
        )
    modules = adapted_modules(source, _ROLES)
    if form == "bat":
        return _read_bat(source, options, modules)
    if options.base_shapes is None:
        raise FormatError(
            f"{source.label}: MiSS does not say how many inputs a module has",
            fix="give --base with the model that the adapter was trained on",
            lacks="base",
        )
    names = BaseNames(options.base_shapes)
    settings = read_settings(source)
    deltas: dict[str, Delta] = {}
    for module in modules.values():
        shared = matrix(source, module, _role(module))
        wanted = f"{module.name}.weight"
        shape = names.shapes[names.unique(source.label, module.key, wanted, names.dotted(wanted))]
        if len(shape) != 2:
            raise MismatchError(f"{source.label}: {wanted} is no matrix", got=f"shape {shape}")
        flipped = for_module(settings, module.name).fan_in_fan_out
        columns, outputs = shape if flipped else shape[::-1]
        if form == "mini" and outputs % shared.shape[1] == 0:
            # The small matrix stands side by side as often as it fits the outputs.
            shared = np.tile(shared, (1, outputs // shared.shape[1]))
        rank, rows = shared.shape
        check_rank(source, module, settings, rank)
        name, place = settle(source, options, names, module, rows, columns, flipped=flipped)
        left = ArrayTensor(np.ascontiguousarray(shared.T))
        # Input i takes column i mod r.
        right = ArrayTensor((np.arange(columns) % rank == np.arange(rank)[:, None]).astype(float))
        delta = LowRank(left, right, 1.0, place.shape, place.transposed)
        put(source.label, deltas, name, module.key, delta)
    return deltas


def _role(module: Adapted) -> str:
    return next(iter(sorted(set(module.keys) - {"alpha"})))


def _read_bat(
    source: AdapterSource, options: ReadOptions, modules: dict[str, Adapted]
) -> dict[str, Delta]:
    """Blocks that multiply the weight, so that the rank is not bounded."""
    names = base_names(source, options, modules, "MiSS (bat)")
    settings = read_settings(source)
    deltas: dict[str, Delta] = {}
    for module in modules.values():
        blocks = whole(source, module, _role(module))
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
            raise FormatError(
                f"{source.label}: {module.key} holds no square blocks",
                got=f"shape {blocks.shape}",
                expected="(outputs / r, r, r), as init_weights 'bat' has them",
            )
        flipped = for_module(settings, module.name).fan_in_fan_out
        change = partial(_multiplied, source, module, blocks)
        name, delta = displaced(source, options, names, module, change, flipped=flipped)
        put(source.label, deltas, name, module.key, delta)
    return deltas


def _multiplied(
    source: AdapterSource, module: Adapted, blocks: Array, weight: Block, rows: int, columns: int
) -> Block:
    count, size = blocks.shape[:2]
    if rows != count * size or columns % size:
        raise misfit(
            source, module, f"{rows} outputs and {columns} inputs", f"{count} blocks of {size}"
        )

    def block(row: slice, column: slice) -> Array:
        lines = np.arange(row.start, row.stop)
        part = weight(row, slice(0, columns)).reshape(lines.size, -1, size)
        mine = blocks[lines // size]
        change = np.einsum("rci,rij->rcj", part, mine)
        change += mine[np.arange(lines.size), lines % size][:, None]
        return np.asarray(change.reshape(lines.size, columns)[:, column])

    return block


KINDS.add(
    "miss",
    Kind(
        name="miss",
        formula="ΔW[i, j] = D[j mod r, i]; bat: each r × r block of W changes by W B + B",
        detect=_detect,
        read=_read,
        notes="MiSS, arXiv:2409.15371, formerly Bone (peft_type BONE). Needs the base's shapes; "
        "with init_weights bat, the base.",
        peft_types=frozenset({"MISS", "BONE"}),
    ),
)
