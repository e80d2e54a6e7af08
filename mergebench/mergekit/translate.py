"""From a configuration of mergekit to a recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mergebench.core.errors import did_you_mean
from mergebench.core.schedule import each_leaf
from mergebench.mergekit.document import Document, Path
from mergebench.mergekit.models import Layers, reference_of, references
from mergebench.mergekit.settings import dtype_of, template_of, vocab_of
from mergebench.mergekit.table import OPTIONS, PRESET, RULES, Known, Rule, reading
from mergebench.mergekit.values import MISSING, compiled, filled, has_gap, number, over_slices
from mergebench.recipe import ModelRef, Recipe

_KEYS = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype"),
    *("out_dtype", "tokenizer_source", "tokenizer", "chat_template"),
)


@dataclass(frozen=True)
class Translation:
    """A recipe, and what should be said about how it was made.

    Attributes
    ----------
    recipe : Recipe
    notes : tuple of str
    """

    recipe: Recipe
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class _Work:
    document: Document
    method: str
    rule: Rule
    known: Known
    layers: Layers
    parts: Mapping[str, Any]
    notes: list[str]


def translate(document: Document, methods: Mapping[str, Known] | Any) -> Translation:
    """Read a configuration as a recipe that does the same.

    Parameters
    ----------
    document : Document
    methods : mapping of name to method
        The merge methods that there are.

    Raises
    ------
    FormatError
        For whatever is unknown, malformed or not offered, with its line and key.
    """
    data = document.mapping((), document.data, _KEYS, OPTIONS)
    notes = [f"{key} {why}" for key, why in OPTIONS.items() if data.get(key) not in (None, False)]
    method = _method(document, data, methods)
    rule, known = RULES[method], methods[method]
    layers = references(document, data)
    work = _Work(document, method, rule, known, layers, data, notes)
    _given(work, ())
    base, models = _models(work)
    params, models = _shared(models)
    for name in _given(work, rule.shared):
        read, found = reading(name, known), _value(work, name, None)
        if read is not None and read.name is not None and found is not MISSING:
            params[read.name] = found
    recipe = Recipe(
        models=models,
        method=method,
        params=params,
        base=base,
        compat=PRESET,
        dtype=dtype_of(document, work.notes),
        vocab=vocab_of(document, work.notes),
        chat_template=template_of(document),
    )
    return Translation(recipe, tuple(work.notes))


def _method(document: Document, data: Mapping[str, Any], methods: Any) -> str:
    if "merge_method" not in data:
        raise document.refuse((), "has no `merge_method`", expected="one of " + ", ".join(RULES))
    path: Path = ("merge_method",)
    name = document.text(path, data["merge_method"])
    if name not in RULES:
        raise document.refuse(path, f"no method {name!r}", fix=did_you_mean(name, RULES))
    if name not in methods or PRESET not in methods[name].compat:
        raise document.refuse(path, f"{name} is not offered as mergekit computes it")
    return name


def _given(work: _Work, names: Collection[str]) -> list[str]:
    """Those parameters that stand anywhere; every other one is refused."""
    found: dict[str, None] = {}
    for path, parameters, beside in work.layers.parameters:
        for name in work.document.mapping(path, parameters, _everything()):
            here = (*path, name)
            if name == "weight" and not work.rule.weighted:
                raise work.document.refuse(
                    here,
                    f"mergekit's {work.method} does not look at weights",
                    fix="leave it out" + _other(work),
                )
            if name not in work.rule.names:
                raise work.document.refuse(
                    here,
                    f"{work.method} has no such parameter",
                    fix=f"it has {', '.join(work.rule.names)}"
                    if work.rule.names
                    else "leave it out",
                )
            if beside and name in work.rule.shared:
                raise work.document.refuse(
                    here,
                    f"mergekit looks for {name} beside all models only",
                    fix="move it to `parameters` of the slice or of the whole configuration",
                )
            found[name] = None
    return [name for name in names if name in found]


def _other(work: _Work) -> str:
    return ", or use a method that does" if work.method != "passthrough" else ""


def _everything() -> list[str]:
    return sorted({name for rule in RULES.values() for name in rule.names})


def _is_weight(work: _Work, name: str) -> bool:
    """Whether a parameter ends up as weights; SLERP's t does."""
    return name == "weight" or (name == "t" and work.rule.base == "end")


def _leaf(work: _Work, name: str, path: Path, value: Any) -> Any:
    read = None if _is_weight(work, name) else reading(name, work.known)
    if read is None and not _is_weight(work, name):
        raise work.document.refuse(path, f"{work.method} is offered without {name}")
    if read is not None and read.note and read.note not in work.notes:
        work.notes.append(read.note)
    if read is None or read.values is None:
        return number(work.document, path, value)
    if not isinstance(value, bool) or value not in read.values:
        allowed = " or ".join(str(each).lower() for each in read.values)
        raise work.document.refuse(
            path, f"{name} = {str(value).lower()} is not offered", expected=allowed
        )
    return read.values[value]


def _value(work: _Work, name: str, model: int | None) -> Any:
    """A parameter over the whole output; of one model, or of all."""
    leaf = partial(_leaf, work, name)
    found = [compiled(work.document, levels, leaf) for levels in work.layers.levels(name, model)]
    if all(each is MISSING for each in found):
        return MISSING
    if len(found) > 1:
        read = reading(name, work.known)
        if read is None or read.name is None:
            if any(map(has_gap, found)):
                return MISSING
        else:
            preset = work.known.compat[PRESET]
            default = preset.get(read.name, work.known.params[read.name].default)
            found = [filled(each, default) for each in found]
    return over_slices(found, work.layers.lengths)


def _models(work: _Work) -> tuple[str | None, tuple[ModelRef, ...]]:
    """The base and the models of the recipe, with weights and parameters of their own."""
    document, rule, layers = work.document, work.rule, work.layers
    path: Path = ("base_model",)
    base = None
    if work.parts.get("base_model") is not None:
        base = reference_of(document, path, work.parts["base_model"])
    if base is None and rule.base in ("required", "end"):
        raise document.refuse((), f"{work.method} needs `base_model`")
    under, rest = layers.split(base, needed=rule.base != "input")
    if rule.base == "input" and under is not None:
        # The base is an input like others; it comes first, and so decides on the config.
        rest, under = [under, *rest], None
    elif under is not None and layers.has_parameters(under):
        work.notes.append(f"parameters of the base {base} are not looked at")
    models = [
        ModelRef(layers.reference(each), _weight(work, each), _own(work, each)) for each in rest
    ]
    if rule.base == "input" and base is not None and not layers.has(base):
        if layers.sliced:
            work.notes.append(
                f"base_model {base} is no source of every slice and takes no part; config and "
                "tokenizer are those of the first source"
            )
        else:
            models = [ModelRef(base, _weight(work, None)), *models]
    _check_count(work, models)
    if rule.base == "input":
        return None, tuple(models)
    reference = base if under is None else layers.reference(under)
    if rule.base == "end":
        assert reference is not None
        return None, _ends(work, reference, models[0])
    return reference, tuple(models)


def _check_count(work: _Work, models: Sequence[ModelRef]) -> None:
    wanted = work.rule.models
    if wanted is None and models:
        return
    if len(models) != wanted:
        beside = " besides base_model" if work.rule.base in ("required", "end") else ""
        raise work.document.refuse(
            work.layers.slices[0].path,
            f"number of models of {work.method}{beside}",
            got=len(models),
            expected="1 or more" if wanted is None else str(wanted),
        )


def _own(work: _Work, model: int) -> dict[str, Any]:
    """Parameters of one model that are not its weight."""
    params = {}
    for name in _given(work, work.rule.own):
        read, found = reading(name, work.known), _value(work, name, model)
        if found is not MISSING and read is not None and read.name is not None:
            params[read.name] = found
    return params


def _shared(models: Sequence[ModelRef]) -> tuple[dict[str, Any], tuple[ModelRef, ...]]:
    """Parameters that are the same for all models, and the models without these."""
    first = models[0].params
    same = {
        name: value
        for name, value in first.items()
        if all(name in each.params and each.params[name] == value for each in models)
    }
    apart = tuple(
        replace(each, params={k: v for k, v in each.params.items() if k not in same})
        for each in models
    )
    return same, apart


def _weight(work: _Work, model: int | None) -> Any:
    if not work.rule.weighted:
        return 1.0
    found = _value(work, "weight", model)
    if has_gap(found):
        whose = "base_model" if model is None else work.layers.reference(model)
        what = "no weight" if found is MISSING else "no weight where no filter matches"
        raise work.document.refuse(
            work.layers.path_of(model),
            f"{whose} has {what}, and {work.method} needs one",
            fix="add `weight` to its parameters, or to those of the whole configuration",
        )
    return found


def _ends(work: _Work, base: str, other: ModelRef) -> tuple[ModelRef, ...]:
    """The two models of SLERP: weights 1 - t and t."""
    share = _value(work, "t", None)
    if has_gap(share):
        raise work.document.refuse((), f"{work.method} needs the parameter `t` at every tensor")
    rest = each_leaf(share, lambda t: 1.0 - t)
    return ModelRef(base, rest), ModelRef(other.path, share)
