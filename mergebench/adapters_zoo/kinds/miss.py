"""MiSS: one small matrix, repeated over groups of inputs."""

from __future__ import annotations

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import adapted_modules, claimed, matrix, settle
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, LowRank
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import ArrayTensor

_ROLES = ("miss_block",)


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    config = source.config or {}
    if (form := config.get("init_weights")) in ("bat", "mini"):
        raise FormatError(f"{source.label}: MiSS with init_weights {form!r} is not supported yet")
    if options.base_shapes is None:
        raise FormatError(
            f"{source.label}: MiSS does not say how many inputs a module has",
            fix="give --base with the model that the adapter was trained on",
        )
    names = BaseNames(options.base_shapes)
    settings = read_settings(source)
    deltas: dict[str, Delta] = {}
    for module in adapted_modules(source, _ROLES).values():
        shared = matrix(source, module, "miss_block")
        wanted = f"{module.name}.weight"
        shape = names.shapes[names.unique(source.label, module.key, wanted, names.dotted(wanted))]
        if len(shape) != 2:
            raise MismatchError(f"{source.label}: {wanted} is no matrix", got=f"shape {shape}")
        rank, rows = shared.shape
        flipped = for_module(settings, module.name).fan_in_fan_out
        columns = shape[0] if flipped else shape[1]
        name, place = settle(source, options, names, module, rows, columns, flipped=flipped)
        left = ArrayTensor(np.ascontiguousarray(shared.T))
        # Input i takes column i mod r.
        right = ArrayTensor((np.arange(columns) % rank == np.arange(rank)[:, None]).astype(float))
        delta = LowRank(left, right, 1.0, place.shape, place.transposed)
        put(source.label, deltas, name, module.key, delta)
    return deltas


KINDS.add(
    "miss",
    Kind(
        name="miss",
        formula="ΔW[i, j] = D[j mod r, i]",
        detect=_detect,
        read=_read,
        notes="MiSS, arXiv:2409.15371. Needs the base's shapes.",
        peft_types=frozenset({"MISS"}),
    ),
)
