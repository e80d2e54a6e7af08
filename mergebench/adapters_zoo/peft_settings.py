"""Which entries of a config reach PEFT, and what they may be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergebench.adapters_zoo.lora_settings import Settings
from mergebench.adapters_zoo.patterns import PATTERNS, ends_with, is_plain
from mergebench.core.errors import FormatError

_LARGEST = 1e30
_FEW = 1000


@dataclass(frozen=True)
class Check:
    """What an entry may be: in words, and as a test."""

    words: str
    test: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value) < _LARGEST


def one_of(*words: str) -> Check:
    """One of these words."""
    return Check("one of " + ", ".join(words), lambda value: value in words)


COUNT = Check("a whole number", _is_count)
STEPS = Check("a whole number from 0 to 100", lambda value: _is_count(value) and value <= 100)
SEED = Check(
    "a whole number of at most 63 bits",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63,
)
NUMBER = Check("a finite number", _is_number)
FLAG = Check("true or false", lambda value: isinstance(value, bool))

#: Entries that say where the adapter lies or how it was trained, not what ΔW is.
_IRRELEVANT = re.compile(
    r"peft_(type|version)|task_type|auto_mapping|base_model_name_or_path|revision|inference_mode|"
    r"target_modules|exclude_modules|modules_to_save|layers_to_transform|layers_pattern|bias|"
    r"init_.*|\w+_dropout|module_dropout|progressbar|runtime_offload_base_weight|"
    r"asa_\w+|use_asa|final_warmup|mask_interval|sample_at_inference|generator_seed"
)


def checked(
    label: str,
    config: Mapping[str, Any],
    entries: Mapping[str, Check],
    patterns: Mapping[str, str],
    modules: Mapping[str, str],
    largest: int,
) -> dict[str, Any]:
    """Entries for PEFT's config class, each looked at.

    Parameters
    ----------
    label : str
    config : mapping
        ``adapter_config.json``.
    entries : mapping of str to Check
        What may reach PEFT.
    patterns : mapping of str to str
        Entries that make exceptions from others for modules that match, as ``{exceptions: entry}``.
        PEFT gets the value of each module instead: its own matching may take for ever.
    modules : mapping of str to str
        Adapted modules, and what PEFT will know them as.
    largest : int
        The largest size of a stored tensor: no count is above it, or else above 1000.

    Raises
    ------
    FormatError
        For a value of a wrong type or size, and for a feature that is not known.
    """
    passed: dict[str, Any] = {}
    for entry, value in config.items():
        if entry in patterns or value is None:
            continue
        if entry not in entries:
            if value and not _IRRELEVANT.fullmatch(entry):
                raise FormatError(
                    f"{label}: adapter_config.json sets {entry}, a feature that this version does "
                    "not know",
                    got=repr(value),
                )
            continue
        _look(label, entry, value, entries[entry], largest)
        passed[entry] = value
    for exceptions, entry in patterns.items():
        listed = config.get(exceptions) or {}
        if not isinstance(listed, Mapping):
            raise FormatError(
                f"{label}: {exceptions} in adapter_config.json",
                expected="an object",
                got=repr(listed),
            )
        if (count := sum(not is_plain(pattern) for pattern in listed)) > PATTERNS:
            raise FormatError(
                f"{label}: {exceptions} in adapter_config.json",
                expected=f"at most {PATTERNS} patterns that are no names",
                got=f"{count} patterns",
            )
        for pattern, value in listed.items():
            _look(label, f"{exceptions}[{pattern!r}]", value, entries[entry], largest)
        passed[exceptions] = _resolved(label, listed, modules)
    return passed


def _look(label: str, entry: str, value: Any, check: Check, largest: int) -> None:
    words = check.words
    if check is COUNT:
        # Layers of that many ranks, places or vectors are made before tensors are put into them.
        words = f"a whole number from 0 to {max(largest, _FEW)}"
    if not check.test(value) or (check is COUNT and value > max(largest, _FEW)):
        raise FormatError(
            f"{label}: {entry} in adapter_config.json", expected=words, got=repr(value)
        )


def _resolved(label: str, listed: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module, known in modules.items():
        for pattern, value in listed.items():
            try:
                hit = ends_with(pattern, module)
            except re.error as error:
                raise FormatError(
                    f"{label}: pattern {pattern!r} of the config is no regular expression: {error}"
                ) from None
            if hit:
                found[known] = value
                break
    return found


def settings_of(config: Mapping[str, Any]) -> tuple[Settings, ...]:
    """What the config says about parameters trained in full, in any kind's words."""
    saved = config.get("modules_to_save") or []
    saved = [saved] if isinstance(saved, str) else saved
    bias = "lora_only" if str(config.get("bias") or "none") != "none" else "none"
    plain = isinstance(saved, list | tuple) and all(isinstance(name, str) for name in saved)
    return (Settings(bias=bias, modules_to_save=tuple(saved) if plain else ()),)
