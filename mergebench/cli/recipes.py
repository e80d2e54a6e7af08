"""Options of the command line as a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.cli import options as o

if TYPE_CHECKING:
    from mergebench.recipe import ModelRef, Recipe


def recipe_of(
    models: list[str],
    base: str | None,
    method: str | None,
    param: list[str] | None,
    then: list[str] | None,
    method_for: list[str] | None,
    compat: str | None,
    dtype: str,
    form: str,
    shard_size: str | None,
    lora_alpha: float | None,
    out: str | None,
    ignore_saved_base: bool,
    part: str | None,
    target: str | None,
    rank: int | None,
    energy: float | None,
    whole: list[str] | None,
    where: list[str] | None,
    include: list[str] | None,
    exclude: list[str] | None,
    on_mismatch: str,
    vocab: str,
    allow_base_mismatch: bool,
    allow_nonfinite: bool,
    block_pattern: str | None,
    task: list[str] | None,
    statistics: list[str] | None,
) -> Recipe:
    """The recipe that options ask for.

    Raises
    ------
    ParameterError
        Naming the option.
    """
    from mergebench.core.errors import ParameterError, did_you_mean
    from mergebench.recipe import DTYPES, FORMS, ON_MISMATCH, VOCAB, ModelRef, Recipe, with_rules
    from mergebench.sources.references import split_weight
    from mergebench.steps import parse_op, parse_part

    for option, value, known in (
        ("--dtype", dtype, DTYPES),
        ("--as", form, FORMS),
        ("--on-mismatch", on_mismatch, ON_MISMATCH),
        ("--vocab", vocab, VOCAB),
    ):
        if value not in known:
            raise ParameterError(f"{option}: {value!r}", fix=did_you_mean(value, known))
    if shard_size is not None:
        o.size("--shard-size", shard_size)
    recipe = Recipe(
        models=with_statistics(
            tuple(ModelRef(*split_weight(each)) for each in models), statistics or ()
        ),
        method=method or ("" if method_for else "linear"),
        params=parse_params(param or []),
        then=tuple(parse_op(each) for each in then or []),
        parts=tuple(parse_part(each) for each in method_for or []),
        tasks=tuple(task or ()),
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        block_pattern=block_pattern,
        base=base,
        compat=compat,
        dtype=dtype,
        form=form,
        shard_size=shard_size,
        lora_alpha=lora_alpha,
        ignore_saved_base=ignore_saved_base,
        part=part,
        target=target,
        rank=rank,
        energy=energy,
        whole=tuple(whole or ()),
        on_mismatch=on_mismatch,
        vocab=vocab,
        allow_base_mismatch=allow_base_mismatch,
        allow_nonfinite=allow_nonfinite,
        out=out,
    )
    return with_out(with_rules(recipe, where or ()))


def with_statistics(models: tuple[ModelRef, ...], given: Sequence[str]) -> tuple[ModelRef, ...]:
    """Models with their statistics files: one for each in order, or ``MODEL=FILE``.

    Raises
    ------
    ParameterError
        For another number of files, or a model that there is none of.
    """
    from mergebench.core.errors import ParameterError, did_you_mean

    found: dict[int, str] = {}
    for place, text in enumerate(given):
        name, equals, file = text.partition("=")
        if equals and not Path(text).expanduser().exists():
            paths = [each.path for each in models]
            known = paths if name in paths else [Path(path).name for path in paths]
            if known.count(name) != 1 or (at := known.index(name)) in found:
                raise ParameterError(
                    f"--statistics: {name!r} is not one model", fix=did_you_mean(name, known)
                )
            found[at] = file
        elif place in found or place >= len(models):
            raise ParameterError(
                "--statistics: one for every model", got=str(len(given)), expected=str(len(models))
            )
        else:
            found[place] = text
    return tuple(replace(each, statistics=found.get(at)) for at, each in enumerate(models))


def parse_params(texts: list[str]) -> dict[str, Any]:
    """Values of ``-p``; several are a tuple.

    Raises
    ------
    ParameterError
        If one is given twice, or is no assignment.
    """
    from mergebench.core.errors import ParameterError
    from mergebench.steps import parse_assignment

    params: dict[str, Any] = {}
    for text in texts:
        key, value = parse_assignment(text)
        if key in params:
            raise ParameterError(f"parameter {key!r} is given twice", fix=f"write -p {key}=a,b")
        parts = tuple(part.strip() for part in value.split(","))
        params[key] = parts if len(parts) > 1 else parts[0]
    return params


def with_out(recipe: Recipe) -> Recipe:
    """Without a place given: a file if all inputs are files, else a folder."""
    if recipe.out is not None:
        return recipe
    files = all(Path(each.path).expanduser().is_file() for each in recipe.models)
    whole = recipe.shard_size is None
    return replace(recipe, out="merged.safetensors" if files and whole else "merged")
