"""C3A: block-circulant updates."""

from __future__ import annotations

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block, Computed
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import adapted_modules, claimed, settle, whole, wide
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import FormatError
from mergebench.core.tensor import Array

_ROLES = ("c3a_kernel",)


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    settings = read_settings(source)
    deltas: dict[str, Delta] = {}
    for module in adapted_modules(source, _ROLES).values():
        kernel = whole(source, module, "c3a_kernel")
        if kernel.ndim != 3:
            raise FormatError(
                f"{source.label}: {module.key} is no kernel", got=f"shape {kernel.shape}"
            )
        rows, columns = kernel.shape[0] * kernel.shape[2], kernel.shape[1] * kernel.shape[2]
        flipped = for_module(settings, module.name).fan_in_fan_out
        name, place = settle(source, options, names, module, rows, columns, flipped=flipped)
        made = Computed(place.shape, _circulant(kernel), place.transposed, wide(source, module))
        put(source.label, deltas, name, module.key, Dense(made))
    return deltas


def _circulant(kernel: Array) -> Block:
    size, width = kernel.shape[2], kernel.shape[1] * kernel.shape[2]

    def block(rows: slice, columns: slice) -> Array:
        row = np.arange(rows.start, rows.stop)[:, None]
        column = np.arange(columns.start, columns.stop)[None, :]
        return np.asarray(kernel[row // size, column // size, (column - row) % size] / width)

    return block


KINDS.add(
    "c3a",
    Kind(
        name="c3a",
        formula="ΔW[i, j] = w[i // b, j // b, (j - i) mod b] / in",
        detect=_detect,
        read=_read,
        notes="C3A, arXiv:2407.19342.",
        peft_types=frozenset({"C3A"}),
    ),
)
