"""Families that PEFT's own layers compute: everything else that can be merged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.dialects import peft
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.on_base import needs_base
from mergebench.adapters_zoo.peft_bridge import (
    Bridge,
    Form,
    Layer,
    ThroughPeft,
    known,
    need_peft,
)
from mergebench.adapters_zoo.peft_families import FAMILIES, Family
from mergebench.adapters_zoo.peft_order import in_order
from mergebench.adapters_zoo.peft_settings import (
    checked,
    settings_of,
)
from mergebench.adapters_zoo.peft_shapes import check_shapes
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.adapters_zoo.values import add_values, is_declared
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.site import kind_of

_SEEDED = (
    "the file stores no {what}: they are drawn again from its seed, which torch promises only for "
    "the version that trained it"
)


@dataclass(frozen=True)
class _Parts:
    """Tensors of an adapter: by module and suffix, those of all modules, and full values."""

    modules: Mapping[str, Mapping[str, str]]
    shared: Mapping[str, str]
    values: frozenset[str]

    @property
    def keys(self) -> frozenset[str]:
        own = {key for suffixes in self.modules.values() for key in suffixes.values()}
        return frozenset(own) | set(self.shared.values()) | self.values


def _parts(family: Family, source: AdapterSource) -> _Parts:
    config = source.config or {}
    if config.get("peft_type") != family.peft_type:
        return _Parts({}, {}, frozenset())
    form = re.compile(rf"(?P<module>.+?)\.(?P<suffix>{family.prefix}.+)")
    modules: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    values: set[str] = set()
    settings = settings_of(config)
    for key in source.tensors:
        start = "base_model."
        if key.startswith(start + family.prefix):
            shared[key.removeprefix(start)] = key
        elif match := form.fullmatch(peft.strip(key)):
            modules.setdefault(match["module"], {})[match["suffix"]] = key
        elif (part := peft.parse(key)) is not None and is_declared(part, settings):
            values.add(key)
    return _Parts(dict(sorted(modules.items())), shared, frozenset(values))


def _detect(family: Family, source: AdapterSource) -> frozenset[str]:
    parts = _parts(family, source)
    if family.name == "vera_drawn" and parts.shared:
        return frozenset()
    return parts.keys


def _remarks(family: Family, source: AdapterSource) -> tuple[str, ...]:
    return tuple(
        f"{source.label}: {_SEEDED.format(what=what)}"
        for suffix, what in family.drawn.items()
        if not suffix or not any(f".{suffix}" in key for key in source.tensors)
    )


def _read(family: Family, source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    parts = _parts(family, source)
    config = source.config or {}
    if options.base_shapes is None:
        raise FormatError(
            f"{source.label}: {family.name} does not say how large the weights are",
            fix="give --base with the model that the adapter was trained on",
            lacks="base",
        )
    if family.need != "nothing" and options.base is None:
        needs_base(source.label, min(parts.keys), family.name)
    if not parts.modules:
        raise FormatError(
            f"{source.label}: the file does not tell which modules it adapts",
            got=min(parts.keys),
            fix="save the adapter with save_indices=True" if family.name == "unilora" else "",
        )
    names = BaseNames(options.base_shapes)
    turned = _is_turned(family, source, names, parts)
    found = [
        _layer(family, source, options, names, turned, *item) for item in parts.modules.items()
    ]
    shared = {suffix: source.tensors[key] for suffix, key in parts.shared.items()}
    for layer, _ in found:
        if family.required and family.required not in layer.tensors:
            raise FormatError(
                f"{source.label}: {layer.name} has no {family.required}",
                fix="save the adapter with save_precomputed_indices=True",
            )
    targets = {layer.name: weight for layer, weight in found}
    layers = [layer for layer, _ in found]
    entries = _entries(family, source, layers)
    need_peft(source.label, family.tuner)
    if family.ordered:
        layers = in_order(source.label, family.ordered, layers, shared, entries)
        entries = _entries(family, source, layers)
    check_shapes(source.label, targets, layers, entries)
    bridge = Bridge(
        source.label, family.peft_type, entries, tuple(layers), shared, family.need, family.double
    )
    deltas: dict[str, Delta] = {}
    for index, layer in enumerate(layers):
        key = min(parts.modules[layer.name].values())
        name = targets[layer.name]
        delta = Dense(ThroughPeft(bridge, index, "weight", layer.shape))
        put(source.label, deltas, name, key, delta)
        if family.biased and layer.biased:
            bias = f"{name.removesuffix('weight')}bias"
            shape = options.base_shapes[bias]
            moved = Dense(ThroughPeft(bridge, index, "bias", shape))
            put(source.label, deltas, bias, key, moved)
    add_values(source, options, deltas, parts.values, settings_of(config), names)
    return deltas


def _is_turned(family: Family, source: AdapterSource, names: BaseNames, parts: _Parts) -> bool:
    """Whether the adapter's weights are stored input × output."""
    for module, keys in parts.modules.items() if family.sides is not None else ():
        assert family.sides is not None
        found = names.dotted(f"{module}.weight")
        if len(found) == 1 and set(family.sides) <= keys.keys():
            a, b = (source.tensors[keys[side]].shape for side in family.sides)
            rows, columns = (*names.shapes[found[0]], 0, 0)[:2]
            if len(a) == len(b) == len(names.shapes[found[0]]) == 2 and rows != columns:
                return (rows, columns) == (a[1], b[0])
    return bool((source.config or {}).get("fan_in_fan_out"))


def _entries(family: Family, source: AdapterSource, layers: list[Layer]) -> dict[str, object]:
    names = {layer.name: known(index) for index, layer in enumerate(layers)}
    config = source.config or {}
    largest = max(max(tensor.shape, default=0) for tensor in source.tensors.values())
    if family.searches:
        # PEFT searches the path for these, where it matches its end for others.
        for entry in family.patterns:
            listed = config.get(entry)
            if isinstance(listed, Mapping):
                config = {**config, entry: {f".*(?:{p}).*": v for p, v in listed.items()}}
    return checked(source.label, config, family.entries, family.patterns, names, largest)


def _layer(
    family: Family,
    source: AdapterSource,
    options: ReadOptions,
    names: BaseNames,
    turned: bool,
    module: str,
    keys: Mapping[str, str],
) -> tuple[Layer, str]:
    key, wanted = min(keys.values()), f"{module}.weight"
    name = names.unique(source.label, key, wanted, names.dotted(wanted))
    bias = f"{name.removesuffix('weight')}bias"
    if options.transposed is not None:
        turned = name in options.transposed
    form = _form(family, source, name, names.shapes[name], key, turned=turned)
    base = options.base if family.need != "nothing" and options.base is not None else {}
    layer = Layer(
        module, form, names.shapes[name],
        {suffix: source.tensors[each] for suffix, each in keys.items()},
        base.get(name), base.get(bias), bias in names.shapes and bias != name,
    )  # fmt: skip
    return layer, name


def _form(
    family: Family,
    source: AdapterSource,
    name: str,
    shape: tuple[int, ...],
    key: str,
    *,
    turned: bool,
) -> Form:
    form: Form
    if len(shape) in (3, 4, 5):
        form = "conv"
    elif kind_of(name, shape) == "embedding" and "embedding" in family.forms:
        form = "embedding"
    else:
        form = "conv1d" if turned else "linear"
    if len(shape) not in (2, 3, 4, 5) or 0 in shape or form not in {"linear", *family.forms}:
        raise MismatchError(
            f"{source.label}: {key} adapts {name}, which {family.name} cannot",
            expected=", ".join(sorted({"linear", *family.forms})),
            got=f"{form} of shape {shape}",
        )
    return form


for _family in FAMILIES:
    KINDS.add(
        _family.name,
        Kind(
            name=_family.name,
            formula=_family.formula,
            detect=partial(_detect, _family),
            read=partial(_read, _family),
            notes=f"{_family.notes} Computed by PEFT's layers, a whole weight at a time (extra: "
            f"peft). Needs the base{'' if _family.need != 'nothing' else chr(39) + 's shapes'}.",
            peft_types=frozenset({_family.peft_type}),
            remarks=partial(_remarks, _family),
            support="PEFT",
        ),
    )
