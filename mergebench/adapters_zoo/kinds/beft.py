"""BEFT: a learned displacement of biases."""

from __future__ import annotations

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lazy import Reshaped
from mergebench.adapters_zoo.modules import adapted_modules, claimed, stored
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import MismatchError
from mergebench.core.tensor import size_of

_ROLES = ("beft_bias",)


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    deltas: dict[str, Delta] = {}
    for module in adapted_modules(source, _ROLES).values():
        tensor = stored(source, module, "beft_bias")
        shape = (size_of(tensor.shape),)
        name = f"{module.name}.bias"
        if names is not None:
            name = names.unique(source.label, module.key, name, names.dotted(name))
            if names.shapes[name] != shape:
                raise MismatchError(
                    f"{source.label}: {module.key} does not fit {name}",
                    expected=f"shape {names.shapes[name]}",
                    got=str(tensor.shape),
                    fix="check that --base is the model that the adapter was trained on",
                )
        put(source.label, deltas, name, module.key, Dense(Reshaped(tensor, shape)))
    return deltas


KINDS.add(
    "beft",
    Kind(
        name="beft",
        formula="Δb = the stored vector",
        detect=_detect,
        read=_read,
        notes="BEFT of PEFT: biases alone.",
        peft_types=frozenset({"BEFT"}),
    ),
)
