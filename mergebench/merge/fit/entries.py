"""What a comparison is made of: methods, chains, recipes in files, and fits."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergebench.core.errors import ParameterError
from mergebench.merge.chains import collects_of
from mergebench.merge.fit.space import check_known, with_values
from mergebench.merge.method import METHODS
from mergebench.recipe import ModelRef, Recipe
from mergebench.recipe.reading import read_recipe
from mergebench.steps import parse_op

_RECIPES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Entry:
    """One line of a comparison, before it is measured.

    Attributes
    ----------
    title : str
    recipe : Recipe
        With lists of values to choose from on the selection split; of a fit, the models.
    fit : tuple of str
        Words of a fit that makes the recipe on the selection split: ``("soup",)``,
        ``("search", "-m", "ties")``; empty where nothing is fitted.
    """

    title: str
    recipe: Recipe
    fit: tuple[str, ...] = ()


def entry_of(
    text: str, models: Recipe, statistics: Mapping[str, tuple[ModelRef, ...]] | None = None
) -> Entry:
    """An entry as it is written.

    ``METHOD[:K=V/V,...][+OP[:K=V,...]]``, such as ``ties:density=0.1/0.2,lam=1+lines:beta=0.5``;
    the name of a recipe file, ``best.yaml``; or ``fit soup``, ``fit search -m ties -n 20``: a fit
    with its options but for models, base, tasks and output, which are those of the comparison.
    ``statistics`` has the models with files of each kind, for methods that need one.

    Raises
    ------
    ParameterError
        For an unknown method or op, or a recipe file that is not there.
    FormatError
        If the file is no recipe.
    """
    if text.split(" ", maxsplit=1)[0] == "fit":
        try:
            words = tuple(shlex.split(text))[1:]
        except ValueError as error:
            raise ParameterError(f"{text!r}: is no fit", got=str(error)) from None
        if not words:
            raise ParameterError("'fit': names no fit", fix="such as 'fit soup'")
        return Entry(text, models, words)
    if Path(text).suffix.lower() in _RECIPES:
        return Entry(text, replace(read_recipe(Path(text).expanduser()), out=None, form="auto"))
    first, *ops = text.split("+")
    method = parse_op(first)
    declared = METHODS[method.name]
    # What filters leave out comes from the base, whatever the method.
    filtered = bool(models.include or models.exclude)
    based = models.base if declared.space != "weight" or ops or filtered else None
    required = any(each.required for each in declared.params.values())
    wanted = None if required else collects_of(declared())
    recipe = replace(
        models,
        models=(statistics or {}).get(wanted.kind if wanted is not None else "", models.models),
        method=method.name,
        params=method.params,
        base=based,
        then=tuple(map(parse_op, ops)),
    )
    return Entry(text, recipe)


def entries_of(
    texts: Sequence[str],
    models: Recipe,
    grid: Mapping[str, str],
    statistics: Mapping[str, tuple[ModelRef, ...]] | None = None,
) -> list[Entry]:
    """All entries, with values to choose from for every method or op that has the parameter.

    Parameters
    ----------
    texts : sequence of str
    models : Recipe
        Its models and base.
    grid : mapping of name to values
        Such as ``lam`` to ``0.1:1.5:0.1``, or ``lines.beta`` to ``0.2/0.4``. What an entry says
        itself comes first; recipes in files and fits are left as they are.
    statistics : mapping of kind to models, optional
        The models with files of each kind.

    Raises
    ------
    ParameterError
        As :func:`entry_of`; for two entries of one title, and for a name that no entry has.
    """
    found = [entry_of(text, models, statistics) for text in texts]
    titles = [each.title for each in found]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ParameterError(f"{twice[0]!r} is given twice", fix="keep one of them")
    paths = [each.path for each in models.models]
    own = [not each.fit and [m.path for m in each.recipe.models] == paths for each in found]
    check_known(list(grid), [each.recipe for each, ours in zip(found, own, strict=True) if ours])
    return [
        replace(each, recipe=with_values(each.recipe, grid)) if ours else each
        for each, ours in zip(found, own, strict=True)
    ]
