"""Parameters that an adapter holds in full, beside its own kind of tensors."""

from __future__ import annotations

from collections.abc import Collection

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions
from mergebench.adapters_zoo.dialects import WHOLE, Part, dotted, peft
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import Settings, for_module
from mergebench.adapters_zoo.peft_settings import settings_of
from mergebench.adapters_zoo.refusals import family_of
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Replacement
from mergebench.core.errors import FormatError


def is_trained_bias(part: Part, settings: tuple[Settings, ...]) -> bool:
    """Whether a saved base parameter is a bias that was trained."""
    bias = for_module(settings, part.module).bias
    return part.role == "saved_base" and part.param == "bias" and bias != "none"


def is_declared(part: Part, settings: tuple[Settings, ...]) -> bool:
    """Whether the config says that a parameter was trained in full."""
    if part.role == "saved_base":
        return is_trained_bias(part, settings)
    declared = for_module(settings, part.module).saves(part.module, part.param)
    return part.role == "wrapped" or declared


def declared(source: AdapterSource) -> frozenset[str]:
    """Parameters that the config declares to be trained in full: modules to save, biases."""
    config = source.config or {}
    settings = settings_of(config)
    if settings == (Settings(),):
        return frozenset()
    parts = {key: dotted.parse(key) for key in source.tensors}
    return frozenset(
        key
        for key, part in parts.items()
        if part is not None
        and part.role in WHOLE
        and is_declared(part, settings)
        # Inside a saved module may be another family's tensors, which are no values.
        and family_of(key) is None
    )


def add_beside(
    source: AdapterSource, options: ReadOptions, deltas: dict[str, Delta], keys: Collection[str]
) -> None:
    """As :func:`add_values`, for parameters that are :func:`declared`."""
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    add_values(source, options, deltas, keys, settings_of(source.config or {}), names)


def add_values(
    source: AdapterSource,
    options: ReadOptions,
    deltas: dict[str, Delta],
    keys: Collection[str],
    settings: tuple[Settings, ...],
    names: BaseNames | None,
) -> None:
    """Add the parameters among ``keys`` to ``deltas``, as new values.

    Raises
    ------
    FormatError
        For a copy of a frozen base parameter, unless the user accepts the base's.
    MismatchError
        If a name means more than one tensor of the base, or a tensor is updated twice.
    """
    stored = frozenset(source.tensors)
    for key in sorted(keys):
        part = dotted.parse(key)
        if part is None or part.role not in WHOLE or part.role == "original":
            continue
        if part.role == "saved_base" and not is_trained_bias(part, settings):
            if options.ignore_saved_base:
                continue
            raise FormatError(
                f"{source.label}: {key} is a copy of a base parameter; it differs from the base "
                "where the vocabulary was resized",
                fix="pass --ignore-saved-base if the base has the same values",
            )
        name = f"{part.module}.{part.param}" if part.module else part.param
        if part.role == "wrapped" and stored.intersection((name, peft.PREFIX + name)):
            # The same bias twice: PEFT, too, loads the plain name.
            continue
        # A head trained in full may have no counterpart in the base: it keeps its own name.
        if names is not None and (found := names.dotted(name)):
            name = names.unique(source.label, key, name, found)
        put(source.label, deltas, name, key, Replacement(source.tensors[key]))
