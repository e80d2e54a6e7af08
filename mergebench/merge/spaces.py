"""What is combined of each tensor: weights or displacements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mergebench.core.errors import MismatchError, ParameterError
from mergebench.merge.method import METHODS, Method
from mergebench.merge.partition import methods_of
from mergebench.merge.variants import Variant
from mergebench.recipe import Recipe
from mergebench.sources import Source

Space = Literal["weight", "delta"]


@dataclass(frozen=True)
class Spaces:
    """The space of each tensor.

    Attributes
    ----------
    rest : weight or delta
        Of tensors that are not in ``apart``.
    apart : mapping of tensor name to weight or delta
    """

    rest: Space
    apart: Mapping[str, Space] = field(default_factory=dict)

    def at(self, name: str) -> Space:
        """The space of one tensor."""
        return self.apart.get(name, self.rest)

    @property
    def used(self) -> tuple[Space, ...]:
        """Every space that a tensor has."""
        return tuple(sorted({self.rest, *self.apart.values()}))


def space_of(recipe: Recipe, form: str, base: Source | None) -> Space:
    """What is combined: displacements, if anything needs them, or weights."""
    found = {_space_of_method(method, form, base) for method in methods_of(recipe)}
    return "delta" if "delta" in found else "weight"


def spaces_of(
    recipe: Recipe, form: str, base: Source | None, space: Space, parts: Mapping[str, int]
) -> Spaces:
    """What is combined of each tensor, where that differs between parts."""
    own = [_space_of_method(method, form, base) for method in methods_of(recipe)]
    if base is None or len(set(own)) == 1:
        return Spaces(space)
    of_parts = own[-len(recipe.parts) :]
    return Spaces(own[0], {name: of_parts[number] for name, number in parts.items()})


def _space_of_method(method: Method | None, form: str, base: Source | None) -> Space:
    if method is None or form != "model":
        # What is written is a displacement, so displacements are combined.
        return "delta"
    if method.space == "either":
        return "weight" if base is None else "delta"
    return method.space


def check_base(
    recipe: Recipe, models: Sequence[Source], base: Source | None, form: str, space: Space
) -> Space:
    """The space, which without full models can only be that of displacements."""
    if base is not None:
        return space
    if any(model.checkpoint is None for model in models):
        space = "delta"
    full = [model.label for model in models if model.checkpoint is not None]
    names = [recipe.method, *(part.method for part in recipe.parts)]
    needing = [name for name in names if name and METHODS[name].space == "delta"]
    what = next(iter(needing), recipe.method) or "this chain"
    if full and space == "delta":
        raise MismatchError(
            f"{what} combines task vectors (fine-tuned minus base), and {full[0]} is a full "
            "checkpoint",
            fix="add --base with the model it was fine-tuned from",
        )
    if full and len(full) < len(models):
        raise MismatchError(
            f"{full[0]} is a full checkpoint and other inputs are task vectors",
            fix="add --base with the model they belong to",
        )
    if form == "model" and not full:
        raise MismatchError(
            "task vectors alone do not make a model",
            fix="add --base, or leave out --as model to write an adapter",
        )
    return space


def check_updates(recipe: Recipe, variants: Sequence[Variant], space: str) -> None:
    """Refuse ops on updates that would get whole weights."""
    if space != "weight":
        return
    for op in (op for each in variants for op in each.ops):
        if op.spec.of_updates:
            raise ParameterError(
                f"{op.name} works on updates, and {recipe.method} gives whole weights here",
                fix="use a method on task vectors: --method task_arithmetic with --base",
            )
