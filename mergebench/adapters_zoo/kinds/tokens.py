"""Trained token rows: some rows of an embedding replaced, alone or beside another adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergebench.adapters_zoo.adapter import (
    KINDS,
    AdapterSource,
    Kind,
    ReadOptions,
    read_adapter,
)
from mergebench.adapters_zoo.dialects import peft
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lazy import WithRows
from mergebench.adapters_zoo.on_base import needs_base
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Difference, Replacement
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import FLOATING, Tensor

_ENTRIES = ("trainable_token_indices", "token_indices")
_ROWS = re.compile(
    r"(?P<module>.+?)(?P<wrapped>\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?"
)


@dataclass(frozen=True)
class _Rows:
    """One embedding: the tensor of its trained rows, and a saved copy of all rows if there is."""

    module: str
    key: str
    copy: str | None


def _parts(source: AdapterSource) -> tuple[AdapterSource, dict[str, _Rows]]:
    """What is left of the adapter, and the embeddings with trained rows."""
    found: dict[str, _Rows] = {}
    for key in source.tensors:
        if (match := _ROWS.fullmatch(peft.strip(key))) is None:
            continue
        module = match["module"]
        if module in found:
            raise FormatError(f"{source.label}: {found[module].key} and {key} are the same rows")
        start = key[: len(key) - len(match[0])]
        copy = f"{start}{module}{match['wrapped'] or ''}.base_layer.weight"
        found[module] = _Rows(module, key, copy if copy in source.tensors else None)
    ours = {each.key for each in found.values()} | {each.copy for each in found.values()}
    tensors = {key: tensor for key, tensor in source.tensors.items() if key not in ours}
    config = source.config
    if config is not None:
        config = {entry: value for entry, value in config.items() if entry not in _ENTRIES}
    return replace(source, tensors=tensors, config=config), found


def _detect(source: AdapterSource) -> frozenset[str]:
    rest, found = _parts(source)
    if not found:
        return frozenset()
    ours = frozenset(set(source.tensors) - set(rest.tensors))
    wanted = (source.config or {}).get("peft_type")
    kinds = [KINDS[name] for name in KINDS if name != "tokens"]
    claims = [kind.detect(rest) for kind in kinds if wanted is None or wanted in kind.peft_types]
    return ours | max(claims, key=len, default=frozenset())


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    rest, found = _parts(source)
    deltas = dict(read_adapter(rest, options)) if rest.tensors else {}
    for each in found.values():
        places = _places(source, each)
        _check_rows(source, each, places)
        name, delta = _update(source, options, each, places)
        put(source.label, deltas, name, each.key, delta)
    return deltas


def _places(source: AdapterSource, each: _Rows) -> tuple[int, ...]:
    """The rows that an embedding's trained rows take the place of, in the order of the file."""
    config: Mapping[str, Any] = source.config or {}
    stated = next((config[entry] for entry in _ENTRIES if config.get(entry)), None)
    if isinstance(stated, Mapping):
        fitting = [
            listed
            for module, listed in stated.items()
            if each.module == module or each.module.endswith(f".{module}")
        ]
        stated = fitting[0] if len(fitting) == 1 else None
    if not isinstance(stated, list | tuple):
        raise FormatError(
            f"{source.label}: {each.key} holds token rows, and which tokens' stands in the config "
            "(trainable_token_indices or token_indices), which does not tell",
            got="no config" if source.config is None else "" if stated is None else repr(stated),
            fix="keep adapter_config.json beside the file",
        )
    whole = all(isinstance(place, int) and not isinstance(place, bool) for place in stated)
    if not whole or min(stated, default=0) < 0 or len(set(stated)) != len(stated):
        raise FormatError(
            f"{source.label}: the tokens of {each.module} in the config",
            expected="different numbers from 0 on",
            got=repr(stated),
        )
    return tuple(stated)


def _check_rows(source: AdapterSource, each: _Rows, places: tuple[int, ...]) -> None:
    rows = source.tensors[each.key]
    if rows.dtype not in FLOATING or len(rows.shape) != 2 or rows.shape[0] != len(places):
        raise MismatchError(
            f"{source.label}: {each.key} holds the rows of {len(places)} tokens",
            expected=f"a floating-point matrix of {len(places)} rows",
            got=f"{rows.dtype} of shape {rows.shape}",
            fix="the config is of another adapter",
        )


def _update(
    source: AdapterSource, options: ReadOptions, each: _Rows, places: tuple[int, ...]
) -> tuple[str, Delta]:
    name = f"{each.module}.weight"
    if options.base_shapes is not None:
        names = BaseNames(options.base_shapes)
        name = names.unique(source.label, each.key, name, names.dotted(name))
    rows = source.tensors[each.key]
    if each.copy is not None and not options.ignore_saved_base:
        # Saved because the vocabulary was resized: the base's own rows may be other ones.
        return name, Replacement(_with_rows(source, each, source.tensors[each.copy], places))
    if options.base is None:
        needs_base(source.label, each.key, "trained token rows")
    weight = options.base[name]
    if rows.shape[1:] != weight.shape[1:]:
        raise MismatchError(
            f"{source.label}: {each.key} does not fit {name}",
            expected=f"rows of {weight.shape[1:]}",
            got=str(rows.shape[1:]),
            fix="check that --base is the model that the adapter was trained on",
        )
    return name, Difference(_with_rows(source, each, weight, places), weight)


def _with_rows(
    source: AdapterSource, each: _Rows, weight: Tensor, places: tuple[int, ...]
) -> WithRows:
    if places and max(places) >= weight.shape[0]:
        raise MismatchError(
            f"{source.label}: {each.key} trains token {max(places)}",
            expected=f"below {weight.shape[0]}, the rows of the embedding",
            got=str(max(places)),
            fix="resize the base's vocabulary as before the training",
        )
    return WithRows(weight, source.tensors[each.key], places)


KINDS.add(
    "tokens",
    Kind(
        name="tokens",
        formula="W[i] = the stored row, for the listed tokens i",
        detect=_detect,
        read=_read,
        notes="Trainable tokens of PEFT, alone or in a LoRA (trainable_token_indices); despite "
        "their name in the file, the rows are values. Needs the base. A head that is tied to the "
        "embedding follows it.",
        peft_types=frozenset({"TRAINABLE_TOKENS", "LORA", "ADALORA"}),
    ),
)
