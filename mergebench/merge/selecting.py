"""Which tensors are merged, by filters and parts of the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergebench.checkpoints.layout import Checkpoint
from mergebench.core.errors import MismatchError, ParameterError
from mergebench.core.site import make_sites, parse_pattern
from mergebench.core.tensor import Tensor
from mergebench.merge.partition import assign, selected
from mergebench.recipe import Recipe
from mergebench.sources import Source

#: Why a tensor that no filter selects is copied.
UNSELECTED = "not selected"


@dataclass(frozen=True, eq=False)
class Selected:
    """Inputs as the filters leave them.

    Attributes
    ----------
    models : tuple of Source
        Without displacements of tensors that are not selected.
    shapes : mapping of tensor name to shape
        Of all inputs, whether selected or not.
    apart : frozenset of tensor names
        Not selected.
    parts : mapping of tensor name to int
        Which part of the recipe a tensor belongs to, counted from 0; without those of none.
    """

    models: tuple[Source, ...]
    shapes: Mapping[str, tuple[int, ...]]
    apart: frozenset[str] = frozenset()
    parts: Mapping[str, int] = field(default_factory=dict)


def select(recipe: Recipe, models: Sequence[Source], base: Source | None) -> Selected:
    """Take the tensors that the filters do not select out of the inputs.

    So are tensors of no part, where nothing says how else they are merged. Full checkpoints get
    the base's tensors in their place, so that nothing downstream needs to know of filters.

    Raises
    ------
    ParameterError
        If a selector is none or matches no tensor, if nothing is left to merge, or if the block
        pattern is none or is found nowhere.
    MismatchError
        If full checkpoints are to be merged without a base to take the other tensors from.
    """
    shapes, pattern = _shapes(models, base), parse_pattern(recipe.block_pattern)
    if recipe.block_pattern is not None and not any(map(pattern.search, shapes)):
        raise ParameterError(
            "block pattern: is found in no tensor name",
            got=recipe.block_pattern,
            fix="`mergebench inspect --tensors` lists the names",
        )
    if not recipe.include and not recipe.exclude and not recipe.parts:
        return Selected(tuple(models), shapes)
    sites, tied = make_sites(shapes, pattern=pattern), list(_tied(models, base))
    chosen = selected(sites, tied, recipe.include, recipe.exclude)
    parts = assign(recipe, sites, tied)
    if not recipe.method and not recipe.ops:
        chosen &= parts.keys()
    if chosen == set(sites):
        return Selected(tuple(models), shapes, parts=parts)
    if not chosen:
        raise ParameterError(
            "include and exclude leave nothing to merge",
            got=f"{len(sites)} tensors, all excluded",
            fix="relax one of them",
        )
    under = None if base is None else base.checkpoint
    for model in models:
        if model.checkpoint is not None and under is None:
            raise MismatchError(
                f"{model.label}: tensors that are not selected come from the base, and none is "
                "given",
                fix="add --base with the model to take them from",
            )
    apart = frozenset(sites) - chosen
    left = tuple(_without(model, apart, under) for model in models)
    return Selected(left, shapes, apart, parts)


def _shapes(models: Sequence[Source], base: Source | None) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of all inputs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for source in (*([base] if base is not None else []), *models):
        if source.checkpoint is not None:
            for name, tensor in source.checkpoint.tensors.items():
                shapes.setdefault(name, tuple(tensor.shape))
        for name, delta in (source.deltas or {}).items():
            shapes.setdefault(name, delta.shape)
    return shapes


def _tied(models: Sequence[Source], base: Source | None) -> Iterator[set[str]]:
    for source in (*([base] if base is not None else []), *models):
        if source.checkpoint is not None:
            for alias, origin in source.checkpoint.aliases.items():
                yield {alias, origin}


def _without(model: Source, apart: frozenset[str], base: Checkpoint | None) -> Source:
    deltas = model.deltas
    if deltas is not None:
        kept = {name: delta for name, delta in deltas.items() if name not in apart}
        deltas = replace(deltas, deltas=kept)
    own = model.checkpoint
    if own is not None and base is not None:
        # A tied tensor is merged once, under the name of its source.
        tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in own.tensors.items()
            if own.aliases.get(name, name) not in apart
        }
        tensors |= {
            name: tensor
            for name, tensor in base.tensors.items()
            if base.aliases.get(name, name) in apart
        }
        aliases = {name: source for name, source in own.aliases.items() if source not in apart}
        aliases |= {name: source for name, source in base.aliases.items() if source in apart}
        own = replace(own, tensors=tensors, aliases=aliases)
    return replace(model, checkpoint=own, deltas=deltas)
