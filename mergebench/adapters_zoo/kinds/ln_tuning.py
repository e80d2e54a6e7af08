"""LN tuning: the parameters of normalisations, trained in full."""

from __future__ import annotations

import re

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.dialects import peft
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Replacement
from mergebench.core.errors import MismatchError

_KEY = re.compile(r"(?P<module>.+)\.ln_tuning_layers\.(?P<param>weight|bias)")


def _found(source: AdapterSource) -> dict[str, str]:
    """Name of the replaced parameter, by the name of its tensor."""
    matches = {key: _KEY.fullmatch(peft.strip(key)) for key in source.tensors}
    return {key: f"{m['module']}.{m['param']}" for key, m in sorted(matches.items()) if m}


def _detect(source: AdapterSource) -> frozenset[str]:
    return frozenset(_found(source))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    deltas: dict[str, Delta] = {}
    for key, wanted in _found(source).items():
        name, tensor = wanted, source.tensors[key]
        if names is not None:
            name = names.unique(source.label, key, wanted, names.dotted(wanted))
            if names.shapes[name] != tensor.shape:
                raise MismatchError(
                    f"{source.label}: {key} does not fit {name}",
                    expected=f"shape {names.shapes[name]}",
                    got=str(tensor.shape),
                    fix="check that --base is the model that the adapter was trained on",
                )
        put(source.label, deltas, name, key, Replacement(tensor))
    return deltas


KINDS.add(
    "ln_tuning",
    Kind(
        name="ln_tuning",
        formula="W = the stored weight and bias",
        detect=_detect,
        read=_read,
        notes="LN tuning, arXiv:2312.11420. The values replace those of the base.",
        peft_types=frozenset({"LN_TUNING"}),
    ),
)
