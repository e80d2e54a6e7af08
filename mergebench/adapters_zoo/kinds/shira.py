"""SHiRA: a sparse update, values at stored places."""

from __future__ import annotations

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block, Computed
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import Adapted, adapted_modules, claimed, whole, wide
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import Array, size_of

_ROLES = ("shira_weight", "shira_indices")


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    if options.base_shapes is None:
        raise FormatError(
            f"{source.label}: a sparse update does not say how large its tensors are",
            fix="give --base with the model that the adapter was trained on",
            lacks="base",
        )
    names = BaseNames(options.base_shapes)
    settings = read_settings(source)
    deltas: dict[str, Delta] = {}
    for module in adapted_modules(source, _ROLES).values():
        wanted = f"{module.name}.weight"
        name = names.unique(source.label, module.key, wanted, names.dotted(wanted))
        shape = names.shapes[name]
        if len(shape) != 2:
            raise MismatchError(f"{source.label}: {name} is no matrix", got=f"shape {shape}")
        turned = for_module(settings, module.name).fan_in_fan_out
        matrix = shape[::-1] if turned else shape
        flat, values = _entries(source, module, matrix)
        block = _scattered(flat, values, matrix[1])
        made = Computed(shape, block, turned, wide(source, module))
        put(source.label, deltas, name, module.key, Dense(made))
    return deltas


def _entries(source: AdapterSource, module: Adapted, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Flat places in rising order, each once, and their values."""
    values = whole(source, module, "shira_weight").reshape(-1)
    key = module.keys.get("shira_indices")
    if key is None:
        raise FormatError(f"{source.label}: {module.name} has no shira_indices")
    tensor = source.tensors[key]
    if tensor.shape != (2, values.size) or tensor.dtype not in ("I64", "I32", "F32"):
        raise FormatError(
            f"{source.label}: {key} are no places",
            got=f"{tensor.dtype} of shape {tensor.shape}",
            expected=f"integers of shape {(2, values.size)}",
        )
    stored = tensor.read(0, size_of(tensor.shape)).reshape(2, -1)
    places = stored.astype(np.int64)
    limits = np.array(shape)[:, None]
    if (places != stored).any() or (places < 0).any() or (places >= limits).any():
        raise MismatchError(
            f"{source.label}: {key} point outside of the weight",
            expected=f"rows below {shape[0]} and columns below {shape[1]}",
            fix="check that --base is the model that the adapter was trained on",
        )
    flat, back = np.unique(places[0] * shape[1] + places[1], return_inverse=True)
    return flat, np.bincount(back, values, flat.size)


def _scattered(flat: Array, values: Array, width: int) -> Block:
    def block(rows: slice, columns: slice) -> Array:
        first, last = rows.start, rows.stop
        low, high = np.searchsorted(flat, (first * width, last * width))
        part = np.zeros((last - first, width))
        part.reshape(-1)[flat[low:high] - first * width] = values[low:high]
        return part[:, columns]

    return block


KINDS.add(
    "shira",
    Kind(
        name="shira",
        formula="ΔW[i, j] = value at the stored places, 0 elsewhere",
        detect=_detect,
        read=_read,
        notes="SHiRA, arXiv:2406.13175. Needs the base's shapes.",
        peft_types=frozenset({"SHIRA"}),
    ),
)
