"""Recipes: what the user asked for, as data that round-trips through YAML and JSON."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.documents import read_bounded
from mergebench.core.errors import FormatError, ParameterError, did_you_mean
from mergebench.core.plain import YAML, parse_yaml
from mergebench.core.rules import add_rules, parse_weight
from mergebench.core.schedule import Cases, parse_schedule, to_plain
from mergebench.steps import (
    OpRef,
    Part,
    named_file,
    op_out,
    ops_in,
    parse_assignment,
    parse_op,
    parse_part,
    part_in,
    parts_in,
    text_in,
    texts_in,
)

__all__ = [
    "DTYPES",
    "FORMS",
    "LARGEST",
    "MOST",
    "ON_MISMATCH",
    "VERSION",
    "VOCAB",
    "ModelRef",
    "OpRef",
    "Part",
    "Recipe",
    "parse_assignment",
    "parse_op",
    "parse_part",
    "part_in",
    "read_recipe",
    "recipe_from_dict",
    "with_rules",
]

#: Version of the recipe format, written as the key ``mergebench``.
VERSION = 1
#: Largest recipe file, in bytes, and most outputs of one recipe. Outputs hold their recipe twice,
#: in a header of 100 MB at most; beyond :data:`~mergebench.core.plain.YAML` bytes it is JSON.
LARGEST, MOST = 1 << 24, 1000
_LINE_ENDS = "\x85\u2028\u2029"
DTYPES = ("keep", "bf16", "f16", "f32", "f64")
FORMS = ("auto", "model", "lora", "delta")
ON_MISMATCH = ("error", "base", "skip", "union")
VOCAB = ("error", "pad", "intersect", "base")


@dataclass(frozen=True)
class ModelRef:
    """One input.

    Attributes
    ----------
    path : str
        A reference: a path, ``base+adapter``, or blocks of models, ``a[0-11],b[4-15]``.
    weight : float, Gradient, Cases or ByName
    params : mapping
        Parameters of the method that have another value for this model.
    statistics : str or None
        A file of what was collected of it with data, for methods that need that.
    """

    path: str
    weight: Any = 1.0
    params: Mapping[str, Any] = field(default_factory=dict)
    statistics: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = {"path": self.path, "weight": to_plain(self.weight)}
        if self.params:
            data["params"] = {key: to_plain(value) for key, value in self.params.items()}
        if self.statistics is not None:
            data["statistics"] = self.statistics
        return data


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a merge.

    Attributes
    ----------
    models : tuple of ModelRef
    method : str
        Name of a merge method; ``""`` where ``ops`` are given instead, or where ``parts`` alone
        are merged.
    params : mapping
        Parameters of the method. A list of values asks for one output per value. A value may be a
        schedule: other values for other tensors (see :mod:`mergebench.core.schedule`).
    ops : tuple of OpRef
        A chain written out, in place of a method.
    then : tuple of OpRef
        Ops applied after the method, in order.
    tasks : tuple of str
        Of a method that gives every model a result of its own, the models whose results are
        wanted, by the names of the outputs; all if empty.
    parts : tuple of Part
        Tensors that are merged by methods of their own, each by the first part that has it. What
        no part has follows ``method`` or ``ops``; without either it is the base's.
    include, exclude : tuple of str
        Selectors (see :mod:`mergebench.core.selector`) of the tensors to merge: those that any of
        ``include`` matches, all if it is empty, and none of ``exclude``.
    block_pattern : str or None
        Finds numbered blocks in tensor names, for gradients over depth, ``block=`` selectors and
        ops that look at depth; see :func:`~mergebench.core.site.parse_pattern`.
    base : str or None
    compat : str or None
        Preset that supplies defaults for ``params``.
    dtype : keep, bf16, f16, f32 or f64
        Of the merged tensors; ``keep`` is the base's dtype, tensor by tensor.
    form : auto, model, lora or delta
        What is written (``as`` in files).
    shard_size : str or None
        Largest file, such as ``5GB``; one file if ``None``.
    lora_alpha : float or None
        For bare adapter files that do not name theirs.
    ignore_saved_base : bool
        Drop copies of base parameters that adapters carry.
    part : str or None
        The component of a pipeline that adapters are read for, such as ``unet``; all if ``None``.
    target : str or None
        The program that a LoRA is written for, such as ``vllm``.
    rank : int or None
        Most rank of a module of a LoRA that is written.
    energy : float or None
        Share of each update's squared norm that the rank of a written LoRA keeps.
    whole : tuple of str
        Selectors of tensors that a written LoRA holds in full, as new values.
    on_mismatch : error, base, skip or union
        What is done with tensors that an input lacks, has in another shape, or has alone.
    vocab : error, pad, intersect or base
        What is done where inputs have different vocabularies.
    chat_template : str or None
        Of the output's tokenizer: a template, or ``auto``, the one that most inputs have.
    allow_base_mismatch : bool
        Merge models that were not made from the base.
    allow_nonfinite : bool
        Pass NaN and infinite entries of inputs through as NaN, entry by entry.
    out : str or None
    revisions : mapping of str to str
        For references to the Hub, as typed, the commits they stand for. What a branch has become
        since does not matter then.
    """

    models: tuple[ModelRef, ...]
    method: str = "linear"
    params: Mapping[str, Any] = field(default_factory=dict)
    ops: tuple[OpRef, ...] = ()
    then: tuple[OpRef, ...] = ()
    tasks: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    block_pattern: str | None = None
    base: str | None = None
    compat: str | None = None
    dtype: str = "keep"
    form: str = "auto"
    shard_size: str | None = None
    lora_alpha: float | None = None
    ignore_saved_base: bool = False
    part: str | None = None
    target: str | None = None
    rank: int | None = None
    energy: float | None = None
    whole: tuple[str, ...] = ()
    on_mismatch: str = "error"
    vocab: str = "error"
    chat_template: str | None = None
    allow_base_mismatch: bool = False
    allow_nonfinite: bool = False
    out: str | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is at its default."""
        data: dict[str, Any] = {"mergebench": VERSION}
        if self.ops:
            data["ops"] = [op_out(each) for each in self.ops]
        elif self.method:
            data["method"] = self.method
        if self.params:
            data["params"] = {
                key: list(map(to_plain, value)) if isinstance(value, tuple) else to_plain(value)
                for key, value in self.params.items()
            }
        data["models"] = [each.to_dict() for each in self.models]
        if self.then:
            data["then"] = [op_out(each) for each in self.then]
        if self.parts:
            data["parts"] = [each.to_dict() for each in self.parts]
        for key in ("tasks", "include", "exclude", "whole"):
            if value := getattr(self, key):
                data[key] = list(value)
        plain = Recipe(())
        for key in (
            "block_pattern",
            "base",
            "compat",
            "dtype",
            "form",
            "shard_size",
            "lora_alpha",
            "ignore_saved_base",
            "part",
            "target",
            "rank",
            "energy",
            "on_mismatch",
            "vocab",
            "chat_template",
            "allow_base_mismatch",
            "allow_nonfinite",
            "out",
        ):
            if (value := getattr(self, key)) != getattr(plain, key):
                data["as" if key == "form" else key] = value
        if self.revisions:
            data["revisions"] = dict(self.revisions)
        return data

    def to_yaml(self) -> str:
        """YAML text that :func:`read_recipe` reads back to an equal recipe.

        Where it is large, it is the part of YAML that is JSON, which takes seconds less to read.
        """
        import yaml

        data = self.to_dict()
        plain_text = json.dumps(data, ensure_ascii=False, indent=1)
        # What YAML makes of that is longer by less.
        if 2 * len(plain_text.encode(errors="replace")) > YAML:
            return plain_text + "\n"
        # PyYAML folds line ends of Unicode that it does not escape, and so loses them.
        plain = not any(mark in plain_text for mark in _LINE_ENDS)
        return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=plain))

    def with_order(self, order: Sequence[int]) -> Recipe:
        """The same with its models in another order; ``order`` has the place of each here."""
        parts = tuple(
            replace(each, weights=tuple(each.weights[place] for place in order))
            if each.weights
            else each
            for each in self.parts
        )
        return replace(self, models=tuple(self.models[place] for place in order), parts=parts)

    def variants(self) -> Iterator[tuple[str, Recipe]]:
        """``(label, recipe)`` of every output: one per combination of listed values.

        Raises
        ------
        ParameterError
            For none, or more than :data:`MOST`.
        """
        swept = [key for key, value in self.params.items() if isinstance(value, (list, tuple))]
        _check_count(self.params)
        for values in itertools.product(*(self.params[key] for key in swept)):
            label = ",".join(
                f"{key}={_named(value)}" for key, value in zip(swept, values, strict=True)
            )
            chosen = {**self.params, **dict(zip(swept, values, strict=True))}
            yield label, replace(self, params=chosen)


def _check_count(params: Mapping[str, Any]) -> None:
    count = prod(len(each) for each in params.values() if isinstance(each, (list, tuple)))
    if empty := [key for key, each in params.items() if each in ((), [])]:
        raise ParameterError(f"parameter {empty[0]!r} has an empty list of values")
    if count > MOST:
        raise ParameterError(
            "one output is asked for per combination of listed values",
            expected=f"1 to {MOST}",
            got=str(count),
            fix="list other values",
        )


def _named(value: Any) -> Any:
    """What an output is called by: selectors have characters that paths cannot hold."""
    return _named(value.otherwise) if isinstance(value, Cases) else value


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
        _check_count(values)
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


def with_rules(recipe: Recipe, rules: Sequence[str]) -> Recipe:
    """The recipe with values for selected tensors, written ``SELECTOR:name=value``.

    Raises
    ------
    ParameterError
        As :func:`~mergebench.core.rules.add_rules`.
    """
    params, weights = add_rules(rules, recipe.params, [each.weight for each in recipe.models])
    models = tuple(
        replace(each, weight=weight) for each, weight in zip(recipe.models, weights, strict=True)
    )
    return replace(recipe, params=params, models=models)


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
