"""Recipes: what the user asked for, as data that round-trips through YAML and JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from mergebench.core.errors import ParameterError
from mergebench.core.plain import YAML
from mergebench.core.rules import add_rules
from mergebench.core.schedule import Cases, to_plain
from mergebench.steps import OpRef, Part, op_out

#: Version of the recipe format, written as the key ``mergebench``.
VERSION = 1
#: Most outputs of one recipe.
MOST = 1000
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
        check_count(self.params)
        for values in itertools.product(*(self.params[key] for key in swept)):
            label = ",".join(
                f"{key}={_named(value)}" for key, value in zip(swept, values, strict=True)
            )
            chosen = {**self.params, **dict(zip(swept, values, strict=True))}
            yield label, replace(self, params=chosen)


def check_count(params: Mapping[str, Any]) -> None:
    """Refuse parameters whose listed values ask for no output, or too many.

    Raises
    ------
    ParameterError
        As :meth:`Recipe.variants`.
    """
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
