"""What an adapter says about its LoRA modules: rank, α, scale rule, orientation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from mergebench.adapters_zoo.adapter import AdapterSource, parse_object
from mergebench.adapters_zoo.patterns import PATTERNS, ends_with, is_plain
from mergebench.core.errors import FormatError, MismatchError, ParameterError

#: Metadata entry in which diffusers writes the config, keys prefixed by the component.
DIFFUSERS_KEY = "lora_adapter_metadata"
_LARGEST = 1e30


@dataclass(frozen=True)
class Settings:
    """One config, reduced to what decides ΔW.

    Attributes
    ----------
    where : str
        The place it was read from, for messages.
    scope : str
        Module prefix that it speaks for, with its dot; ``""`` for all modules.
    r, lora_alpha : float or None
        Defaults of rank and α; None where the file is silent.
    rank_pattern, alpha_pattern : mapping of regular expression to number
        Exceptions; the first in file order that matches the end of a module path wins, as when
        PEFT loads the file.
    use_rslora : bool
        Scale α/√r (arXiv:2312.03732) instead of α/r (arXiv:2106.09685).
    fan_in_fan_out : bool
        Weights are stored input × output.
    bias : str
        ``none``, ``all`` or ``lora_only``: which biases were trained in full.
    modules_to_save : tuple of str
        Ends of the paths of modules trained in full.
    """

    where: str = "the file"
    scope: str = ""
    r: float | None = None
    lora_alpha: float | None = None
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()

    def rank_of(self, label: str, module: str) -> float | None:
        """The rank that the config gives a module; None where it is silent.

        Raises
        ------
        FormatError
            If a pattern is no regular expression.
        """
        return _lookup(label, self.rank_pattern, module.removeprefix(self.scope), self.r)

    def saves(self, module: str, param: str) -> bool:
        """Whether ``module.param`` is declared to be trained in full.

        PEFT wraps a module whose path ends with an entry of ``modules_to_save``, and with it
        everything inside.
        """
        if param == "bias" and self.bias != "none":
            return True
        parts = f"{module}.{param}".split(".")
        paths = [".".join(parts[:count]) for count in range(1, len(parts))]
        return any(path.endswith(entry) for path in paths for entry in self.modules_to_save)


@dataclass(frozen=True)
class Stated:
    """One config as it stands in the file: where it was found, for which modules, its entries."""

    where: str
    scope: str
    entries: Mapping[str, Any]


def stated(source: AdapterSource) -> tuple[Stated, ...]:
    """Every config that the adapter holds.

    The sources, first found wins: ``adapter_config.json`` (or its copy in the metadata),
    diffusers' ``lora_adapter_metadata`` (one config per component), bare ``lora_alpha`` or
    ``alpha`` and ``r`` or ``rank`` entries of the metadata.

    Raises
    ------
    FormatError
        If a metadata entry is not what it should be.
    """
    label, metadata = source.label, source.metadata
    if source.config is not None:
        return (Stated("adapter_config.json", "", source.config),)
    if DIFFUSERS_KEY in metadata:
        entries = parse_object(label, DIFFUSERS_KEY, metadata[DIFFUSERS_KEY])
        where = f"metadata entry {DIFFUSERS_KEY!r}"
        return tuple(Stated(where, scope, one) for scope, one in _scoped(entries).items())
    flat: dict[str, float] = {}
    for name, spellings in (("lora_alpha", ("lora_alpha", "alpha")), ("r", ("r", "rank"))):
        for spelling in spellings:
            if spelling in metadata:
                flat.setdefault(name, _from_text(label, spelling, metadata[spelling]))
    return (Stated("the metadata", "", flat),) if flat else ()


def read_settings(source: AdapterSource, alpha: str = "lora_alpha") -> tuple[Settings, ...]:
    """All settings that the adapter states; none where it holds no config.

    Parameters
    ----------
    source : AdapterSource
    alpha : str, default "lora_alpha"
        The config's entry for α.

    Raises
    ------
    FormatError
        For a value of a wrong type.
    """
    return tuple(
        _settings(source.label, replace(one, entries=_with_alpha(one.entries, alpha)))
        for one in stated(source)
    )


def _with_alpha(entries: Mapping[str, Any], alpha: str) -> Mapping[str, Any]:
    return {"lora_alpha": entries[alpha], **entries} if alpha in entries else entries


def for_module(settings: tuple[Settings, ...], module: str) -> Settings:
    """The settings that speak for a module; empty ones where none does."""
    return next((one for one in settings if module.startswith(one.scope)), Settings())


def scale_of(
    label: str,
    key: str,
    module: str,
    rank: int,
    settings: Settings,
    *,
    alpha: float | None,
    fallback: float | None,
) -> float:
    """The factor before BA of one module.

    Parameters
    ----------
    label, key : str
        The adapter and the tensor A, for messages.
    module : str
        Module path, without PEFT's prefix.
    rank : int
        Number of rows of A.
    settings : Settings
    alpha : float or None
        α from a tensor of the module itself.
    fallback : float or None
        α from the user, for files that state none.

    Raises
    ------
    MismatchError
        If the rank is not the one that the settings give, or two α disagree.
    ParameterError
        If no α is known.
    """
    path = module.removeprefix(settings.scope)
    expected = _lookup(label, settings.rank_pattern, path, settings.r)
    if expected is not None and expected != rank:
        raise MismatchError(
            f"{label}: rank of {key}",
            expected=f"{expected:g} ({settings.where})",
            got=str(rank),
            fix="the config is of another adapter, or its rank_pattern is wrong (PEFT sorts it "
            "when saving, which may change what matches first)",
        )
    stated = _lookup(label, settings.alpha_pattern, path, settings.lora_alpha)
    if alpha is not None and stated is not None and alpha != stated:
        raise MismatchError(
            f"{label}: α of {key}",
            expected=f"{stated:g} ({settings.where})",
            got=f"{alpha:g} from its .alpha tensor",
            fix="remove the wrong one",
        )
    chosen = next((value for value in (alpha, stated, fallback) if value is not None), None)
    if chosen is None:
        raise ParameterError(
            f"{label}: the file states no α for {key} (rank {rank}), so its scale is unknown",
            fix=f"pass --lora-alpha; --lora-alpha {rank} gives scale 1",
            lacks="alpha",
        )
    if rank < 1:
        raise FormatError(f"{label}: rank of {key}", expected="at least 1", got=str(rank))
    return chosen / (math.sqrt(rank) if settings.use_rslora else rank)


def _lookup(
    label: str, patterns: Mapping[str, float], module: str, default: float | None
) -> float | None:
    for pattern, value in patterns.items():
        try:
            if ends_with(pattern, module):
                return value
        except re.error as error:
            raise FormatError(
                f"{label}: pattern {pattern!r} of the config is no regular expression: {error}"
            ) from None
    return patterns.get(module, default)


def _scoped(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Split ``{"unet.r": 4, …}`` by component; entries without one go under ``""``."""
    if "r" in entries or "lora_alpha" in entries:
        return {"": dict(entries)}
    configs: dict[str, dict[str, Any]] = {}
    for entry, value in entries.items():
        scope, _, name = entry.rpartition(".")
        configs.setdefault(f"{scope}." if scope else "", {})[name] = value
    return configs


def _from_text(label: str, entry: str, text: str) -> float:
    with suppress(ValueError):
        if abs(number := float(text)) < _LARGEST:
            return number
    raise FormatError(
        f"{label}: metadata entry {entry!r}", expected="a number that is finite", got=repr(text)
    )


def _settings(label: str, one: Stated) -> Settings:
    where, config = one.where, one.entries

    def fail(entry: str, expected: str, value: Any) -> FormatError:
        return FormatError(f"{label}: {entry} in {where}", expected=expected, got=repr(value))

    def number(entry: str, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise fail(entry, "a number", value)
        if not abs(value) < _LARGEST:
            raise fail(entry, "a finite number", value)
        return float(value)

    def numbers(entry: str) -> dict[str, float]:
        patterns = config.get(entry) or {}
        if not isinstance(patterns, Mapping):
            raise fail(entry, "an object", patterns)
        read = {str(key): number(f"{entry}[{key!r}]", value) for key, value in patterns.items()}
        if (count := sum(not is_plain(key) for key in read)) > PATTERNS:
            raise fail(entry, f"at most {PATTERNS} patterns that are no names", f"{count} patterns")
        return {key: value for key, value in read.items() if value is not None}

    def flag(entry: str) -> bool:
        value = config.get(entry)
        if value is not None and not isinstance(value, bool):
            raise fail(entry, "true or false", value)
        return bool(value)

    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list | tuple) or not all(isinstance(name, str) for name in saved):
        raise fail("modules_to_save", "a list of names", saved)
    bias = config.get("bias") or "none"
    # Of the adapted modules: PEFT names the family here.
    only = f"{str(config.get('peft_type') or 'lora').lower()}_only"
    if bias not in ("none", "all", "lora_only", only):
        raise fail("bias", f"none, all or {only}", bias)
    return Settings(
        where=where,
        scope=one.scope,
        r=number("r", config.get("r")),
        lora_alpha=number("lora_alpha", config.get("lora_alpha")),
        rank_pattern=numbers("rank_pattern"),
        alpha_pattern=numbers("alpha_pattern"),
        use_rslora=flag("use_rslora"),
        fan_in_fan_out=flag("fan_in_fan_out"),
        bias="lora_only" if bias == only else bias,
        modules_to_save=tuple(saved),
    )
