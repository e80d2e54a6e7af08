"""What is written: a model, an adapter or a task vector."""

from __future__ import annotations

from collections.abc import Sequence

from mergebench.adapters_zoo.targets import target_named
from mergebench.core.delta import LowRank, Replacement
from mergebench.core.errors import ParameterError
from mergebench.recipe import Recipe
from mergebench.sources import Source


def form_of(recipe: Recipe, models: Sequence[Source], base: Source | None) -> str:
    """Model, lora or delta: as asked, or what the inputs allow.

    Raises
    ------
    ParameterError
        For options of adapters where none is written, or out of their bounds.
    """
    form = _wanted_form(recipe, models, base)
    _check_lora(recipe, form)
    return form


def _wanted_form(recipe: Recipe, models: Sequence[Source], base: Source | None) -> str:
    if recipe.form != "auto":
        return recipe.form
    if base is not None or any(model.checkpoint is not None for model in models):
        return "model"
    factored = all(
        isinstance(delta, (LowRank, Replacement))
        for model in models
        for delta in (model.deltas or {}).values()
    )
    return "lora" if factored else "delta"


def _check_lora(recipe: Recipe, form: str) -> None:
    """Options of adapters are for adapters, and within their bounds."""
    options = ("target", "rank", "energy", "whole")
    given = [name for name in options if getattr(recipe, name) not in (None, ())]
    if given and form != "lora":
        raise ParameterError(
            f"{given[0]}: is for adapters",
            got=f"a {form} to write",
            fix=f"add --as lora, or leave out --{given[0]}",
        )
    if recipe.target is not None:
        target_named(recipe.target)
    if recipe.energy is not None and not 0 < recipe.energy <= 1:
        raise ParameterError("energy", expected="above 0 and at most 1", got=f"{recipe.energy:g}")
    if recipe.rank is not None and recipe.rank < 1:
        raise ParameterError("rank", expected="at least 1", got=str(recipe.rank))
