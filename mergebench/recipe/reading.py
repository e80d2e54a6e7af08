"""Recipes from YAML and JSON: every key and value is checked before anything is opened."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.documents import read_bounded
from mergebench.core.errors import FormatError, ParameterError, did_you_mean
from mergebench.core.plain import parse_yaml
from mergebench.core.rules import parse_weight
from mergebench.core.schedule import parse_schedule
from mergebench.recipe import (
    DTYPES,
    FORMS,
    ON_MISMATCH,
    VERSION,
    VOCAB,
    ModelRef,
    Recipe,
    check_count,
    with_rules,
)
from mergebench.steps import named_file, ops_in, parts_in, text_in, texts_in

#: Largest recipe file, in bytes. Outputs hold their recipe twice, in a header of 100 MB at most;
#: beyond :data:`~mergebench.core.plain.YAML` bytes it is JSON.
LARGEST = 1 << 24


def recipe_from_dict(data: Any, where: str = "recipe") -> Recipe:
    """Check plain data and make a recipe of it.

    Raises
    ------
    FormatError
        For unknown keys (with the nearest known one), wrong types, a missing ``models`` list or
        a version this release cannot read.
    """
    if not isinstance(data, Mapping):
        raise FormatError(f"{where}: a recipe is a mapping", got=type(data).__name__)
    known = {
        "mergebench", "method", "params", "ops", "models", "then", "tasks", "where", "include",
        "exclude", "base", "compat", "dtype", "as", "shard_size", "lora_alpha", "ignore_saved_base",
        "part", "target", "rank", "energy", "on_mismatch", "vocab", "chat_template", "parts",
        "allow_base_mismatch", "allow_nonfinite", "out", "block_pattern", "whole", "revisions",
    }  # fmt: skip
    for key in data:
        if key not in known:
            raise FormatError(f"{where}: unknown key {key!r}", fix=did_you_mean(str(key), known))
    if data.get("mergebench", VERSION) != VERSION:
        raise FormatError(
            f"{where}: recipe version", got=str(data["mergebench"]), expected=str(VERSION)
        )
    if "ops" in data and not data["ops"]:
        raise FormatError(f"{where}: `ops` is empty", fix="name an op, or a method instead")
    if "ops" in data and ("method" in data or "params" in data):
        raise FormatError(f"{where}: has both `method` and `ops`", fix="keep one of them")
    models = data.get("models")
    if not isinstance(models, Sequence) or isinstance(models, str) or not models:
        raise FormatError(f"{where}: `models` must be a list of references", got=repr(models))
    params = {} if data.get("params") is None else data["params"]
    if not isinstance(params, Mapping):
        raise FormatError(f"{where}: `params` must be a mapping", got=repr(params))
    refs = tuple(_model_in(each, where) for each in models)
    with named_file(where):
        values = {str(k): _value_in(v, str(k)) for k, v in params.items()}
    recipe = Recipe(
        models=refs,
        params=values,
        method=_method_in(data, where),
        ops=ops_in(data, "ops", where),
        then=ops_in(data, "then", where),
        tasks=texts_in(data, "tasks", where),
        parts=parts_in(data, where),
        include=texts_in(data, "include", where),
        exclude=texts_in(data, "exclude", where),
        block_pattern=text_in(data, "block_pattern", where),
        base=_base_in(data, where),
        compat=text_in(data, "compat", where),
        dtype=_choice(data, "dtype", DTYPES, where),
        form=_choice(data, "as", FORMS, where),
        shard_size=text_in(data, "shard_size", where),
        lora_alpha=_number(data.get("lora_alpha"), "lora_alpha", where),
        ignore_saved_base=_flag(data, "ignore_saved_base", where),
        part=text_in(data, "part", where),
        target=text_in(data, "target", where),
        rank=_whole(data.get("rank"), "rank", where),
        energy=_number(data.get("energy"), "energy", where),
        whole=texts_in(data, "whole", where),
        on_mismatch=_choice(data, "on_mismatch", ON_MISMATCH, where),
        vocab=_choice(data, "vocab", VOCAB, where),
        chat_template=text_in(data, "chat_template", where),
        allow_base_mismatch=_flag(data, "allow_base_mismatch", where),
        allow_nonfinite=_flag(data, "allow_nonfinite", where),
        out=text_in(data, "out", where),
        revisions=_revisions_in(data, where),
    )
    with named_file(where):
        check_count(values)
        return with_rules(recipe, texts_in(data, "where", where))


def _method_in(data: Mapping[str, Any], where: str) -> str:
    """``linear`` where nothing says what is done with the tensors."""
    if "ops" in data:
        return ""
    return text_in(data, "method", where) or ("" if data.get("parts") else "linear")


def _value_in(value: Any, name: str) -> Any:
    """A parameter, or a tuple of values to sweep over."""
    if isinstance(value, list):
        if any(isinstance(each, list) for each in value):
            raise ParameterError(f"`{name}`: a list in a list of values", got=repr(value)[:200])
        return tuple(parse_schedule(each, name) if isinstance(each, Mapping) else each
                     for each in value)  # fmt: skip
    return value


def _model_in(data: Any, where: str) -> ModelRef:
    if isinstance(data, str):
        return ModelRef(data)
    if isinstance(data, Mapping) and ("path" in data or "slices" in data):
        known = ["path", "slices", "weight", "params", "statistics"]
        for key in data:
            if key not in known:
                raise FormatError(
                    f"{where}: unknown key {key!r} of a model", fix=did_you_mean(str(key), known)
                )
        path = _reference(data, where)
        weight = data.get("weight")
        if not isinstance(weight, (str, Mapping)):
            weight = _number(weight, "weight", where)
        with named_file(where):
            given = 1.0 if weight is None else parse_weight(weight, path)
        params = data.get("params") or {}
        if not isinstance(params, Mapping):
            raise FormatError(f"{where}: `params` of {path} must be a mapping", got=repr(params))
        return ModelRef(
            path,
            given,
            {str(key): value for key, value in params.items()},
            text_in(data, "statistics", where),
        )
    raise FormatError(f"{where}: a model is a path or `{{path, weight}}`", got=repr(data))


def _reference(data: Mapping[str, Any], where: str) -> str:
    """The reference of an input: its path, or the blocks in ``slices``."""
    if ("path" in data) == ("slices" in data):
        raise FormatError(f"{where}: a model has both `path` and `slices`", fix="keep one of them")
    if "path" in data:
        return str(data["path"])
    listed, found = data["slices"], []
    for each in listed if isinstance(listed, list) else []:
        blocks = str(each.get("blocks", "")) if isinstance(each, Mapping) else ""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", blocks)
        if match is None or set(each) != {"path", "blocks"}:
            raise FormatError(
                f"{where}: a slice is `{{path: …, blocks: 0-11}}`", got=repr(each)[:200]
            )
        found.append(f"{each['path']}[{match[1]}-{match[2] or match[1]}]")
    if not found:
        raise FormatError(f"{where}: `slices` must be a list", got=repr(listed)[:200])
    return ",".join(found)


def _base_in(data: Mapping[str, Any], where: str) -> str | None:
    base = data.get("base")
    if isinstance(base, Mapping):
        if set(base) != {"slices"}:
            raise FormatError(f"{where}: `base` is a path or `{{slices: […]}}`", got=repr(base))
        return _reference(base, where)
    return text_in(data, "base", where)


def _revisions_in(data: Mapping[str, Any], where: str) -> dict[str, str]:
    found = data.get("revisions") or {}
    if not isinstance(found, Mapping):
        raise FormatError(f"{where}: `revisions` must be a mapping", got=repr(found)[:200])
    for reference, commit in found.items():
        if not re.fullmatch("[0-9a-f]{40}", str(commit)):
            raise FormatError(
                f"{where}: `revisions` of {reference}",
                got=repr(commit)[:200],
                expected="a commit of 40 hexadecimal digits",
            )
    return {str(reference): str(commit) for reference, commit in found.items()}


def _choice(data: Mapping[str, Any], key: str, choices: Sequence[str], where: str) -> str:
    value = data.get(key, choices[0])
    if value not in choices:
        raise FormatError(
            f"{where}: `{key}`", got=repr(value), expected="one of " + ", ".join(choices)
        )
    return str(value)


def _flag(data: Mapping[str, Any], key: str, where: str) -> bool:
    value = data.get(key, False)
    if not isinstance(value, bool):
        raise FormatError(f"{where}: `{key}` must be true or false", got=repr(value))
    return value


def _whole(value: Any, key: str, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise FormatError(f"{where}: `{key}` must be a whole number", got=repr(value))
    return None if value is None else int(value)


def _number(value: Any, key: str, where: str) -> float | None:
    if value is None:
        return None
    # The comparison refuses NaN, infinity, and integers beyond every float.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:
        raise FormatError(f"{where}: `{key}` must be a number", got=repr(value))
    return float(value)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML or JSON file.

    Raises
    ------
    FormatError
        If the file is not a recipe.
    """
    try:
        raw = read_bounded(path, LARGEST)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such recipe") from None
    except OSError as error:
        raise cannot("read", path, error) from error
    try:
        data = parse_yaml(raw.decode("utf-8"))
    except ValueError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path}: not YAML or JSON ({reason})") from None
    return recipe_from_dict(data, str(path))
