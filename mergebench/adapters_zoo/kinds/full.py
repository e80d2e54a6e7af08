"""Full differences in LyCORIS' names: weights, biases and norms trained whole."""

from __future__ import annotations

from collections.abc import Mapping

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.modules import Adapted, adapted_modules, claimed, stored
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import MismatchError

#: Role -> parameter of the module that it displaces.
_ROLES: Mapping[str, str] = {"diff": "weight", "diff_b": "bias", "w_norm": "weight",
                             "b_norm": "bias"}  # fmt: skip


def _modules(source: AdapterSource) -> dict[str, Adapted]:
    # Words as short as these occur in models, so only flattened names count.
    return {name: each for name, each in adapted_modules(source, _ROLES).items() if each.flat}


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(_modules(source))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    deltas: dict[str, Delta] = {}
    for module in _modules(source).values():
        for role in sorted(set(module.keys) - {"alpha"}):
            key, tensor = module.keys[role], stored(source, module, role)
            name = f"{module.name}.{_ROLES[role]}"
            if names is not None:
                found = names.flattened(module.name)
                weight = names.unique(source.label, key, f"{module.name}.weight", found)
                name = f"{weight.removesuffix('weight')}{_ROLES[role]}"
                if names.shapes.get(name) != tensor.shape:
                    raise MismatchError(
                        f"{source.label}: {key} does not fit {name}",
                        expected=f"shape {names.shapes.get(name, 'none')}",
                        got=str(tensor.shape),
                        fix="check that --base is the model that the adapter was trained on",
                    )
            put(source.label, deltas, name, key, Dense(tensor))
    return deltas


KINDS.add(
    "full",
    Kind(
        name="full",
        formula="ΔW = the stored difference",
        detect=_detect,
        read=_read,
        notes="LyCORIS' full and norm modules (diff, diff_b, w_norm, b_norm).",
    ),
)
