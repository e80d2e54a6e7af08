"""The outputs of one recipe: chains, expanded parameters and a place for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergebench.core.errors import ParameterError
from mergebench.core.params import ALIASES
from mergebench.core.schedule import is_schedule, leaves, value_at
from mergebench.core.site import Site
from mergebench.merge.abreast import abreast
from mergebench.merge.apart import chosen, names_of, pick
from mergebench.merge.chains import chain, combines, is_apart
from mergebench.merge.method import METHODS, Method
from mergebench.merge.op import OPS, Chain, Op
from mergebench.merge.partition import expanded_op, expanded_part
from mergebench.recipe import ModelRef, Recipe
from mergebench.sources import Source
from mergebench.steps import OpRef, Part

_UNSAFE = re.compile(r"[^\w.,=+~-]|\.{3,}|^\.+")
_FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".gguf")


@dataclass(frozen=True, eq=False)
class Variant:
    """One output.

    Attributes
    ----------
    label : str
        Which of several.
    recipe : Recipe
        With every parameter at its value.
    ops : Chain
        Of tensors that no schedule singles out.
    out : Path or None
    chains : mapping of tensor name to Chain
        Where schedules or parts give a tensor a chain of its own; else empty.
    ordered : bool
        Whether an op of some tensor depends on the order in which the user names the models.
    tail : Chain
        What ends every chain where each model has a result of its own.
    listed : tuple of int
        The places of the models in the order in which stored recipes have them; empty for the
        order of the stack.
    """

    label: str
    recipe: Recipe
    ops: Chain
    out: Path | None
    chains: Mapping[str, Chain] = field(default_factory=dict)
    ordered: bool = False
    tail: Chain = ()
    listed: tuple[int, ...] = ()

    @property
    def stored(self) -> Recipe:
        """The recipe as outputs hold it."""
        return self.recipe.with_order(self.listed) if self.listed else self.recipe

    def at(self, name: str) -> Chain:
        """The chain of one tensor."""
        return self.chains.get(name, self.ops)

    @cached_property
    def distinct(self) -> tuple[Chain, ...]:
        """Every chain in use."""
        return tuple(dict.fromkeys(self.chains.values())) or (self.ops,)


def make_variants(recipe: Recipe) -> tuple[Method | None, tuple[Variant, ...]]:
    """The method, ``None`` for a chain written out, and one variant per combination of values.

    Raises
    ------
    ParameterError
        For unknown or missing names and values, and for places that cannot be.
    """
    method = METHODS[recipe.method] if recipe.method else None
    if method is None and not recipe.ops:
        if not recipe.parts:
            raise ParameterError("neither a method nor ops are given", fix="add --method")
        if recipe.then:
            raise ParameterError("`then` follows a method", fix="write it into the parts")
    if method is None and recipe.compat is not None:
        raise ParameterError("`compat` belongs to a method", fix="leave it out beside `ops`")
    if method is None and recipe.params:
        raise ParameterError(
            "`params` belong to a method", fix="write parameters into `ops`: trim:density=0.2"
        )
    found = []
    for label, each in recipe.variants():
        params = {} if method is None else method.expand(each.params, each.compat)
        expanded = replace(
            each,
            params=params,
            models=tuple(_own_params(ref, method, each) for ref in each.models),
            ops=tuple(expanded_op(ref) for ref in each.ops),
            then=tuple(expanded_op(ref) for ref in each.then),
            parts=tuple(expanded_part(number, each) for number in range(len(each.parts))),
        )
        whole = _whole(expanded)
        if recipe.tasks and not is_apart(whole):
            raise ParameterError(
                f"{recipe.method or 'this chain'} gives one result for all models, and tasks are "
                "named",
                got=", ".join(recipe.tasks),
                fix="leave out --task, or take a method that gives each model a result of its own",
            )
        out = _place(recipe.out, label)
        # The place is not part of what decides the bytes.
        ordered = any(one.ordered for ops in _choices(expanded) for one in ops)
        found.append(Variant(label, replace(expanded, out=None), whole, out, ordered=ordered))
    if not found:
        empty = next(key for key, value in recipe.params.items() if value in ((), []))
        raise ParameterError(f"parameter {empty!r} has an empty list of values")
    _check_apart(found, recipe)
    return method, tuple(found)


def _choices(recipe: Recipe) -> Iterator[Chain]:
    """The chains that words which differ between tensors can give; numbers do not matter."""
    yield build(recipe, None)
    for params in _worded(recipe.params):
        with suppress(ParameterError):
            yield build(replace(recipe, params=params), None)
    for ref in (*recipe.ops, *recipe.then):
        for params in _worded(ref.params):
            with suppress(ParameterError):
                yield build(Recipe((), "", ops=(OpRef(ref.name, params),)), None)
    for part in recipe.parts:
        yield from _choices(Recipe((), part.method, part.params, part.ops, part.then))


def _worded(params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same parameters with each word that a scheduled one takes somewhere."""
    for key, value in params.items():
        for leaf in leaves(value) if is_schedule(value) else ():
            if isinstance(leaf, str):
                yield {**params, key: leaf}


def _check_apart(variants: Sequence[Variant], recipe: Recipe) -> None:
    if recipe.out and len({str(each.out) for each in variants}) < len(variants):
        raise ParameterError("two outputs would have the same place", fix="list each value once")


def split(
    variants: Sequence[Variant], recipe: Recipe, models: Sequence[Source], given: Sequence[int]
) -> tuple[Variant, ...]:
    """One output per model where a chain gives every model a result of its own.

    Parameters
    ----------
    variants : sequence of Variant
        One per combination of values.
    recipe : Recipe
        As asked; ``tasks`` names the results that are wanted, all if it is empty.
    models : sequence of Source
        In canonical order.
    given : sequence of int
        For each of them its place on the command line, which is the order of the outputs.

    Raises
    ------
    ParameterError
        If a task is named that there is none of, or two outputs would have the same place.
    """
    names = names_of([model.label for model in models])
    found = []
    for each in variants:
        if not is_apart(each.ops):
            found.append(each)
            continue
        wanted = chosen(recipe.tasks, names, recipe.method or "ops")
        for place in sorted(wanted, key=given.__getitem__):
            name, tail = names[place], (pick(place),)
            # A single task that is asked for is the output itself, as a single value is.
            shown = [each.label] if len(recipe.tasks) == 1 else [name, each.label]
            label = ",".join(filter(None, shown))
            alone = replace(each.recipe, tasks=(name,))
            out = _place(recipe.out, label)
            whole = (*each.ops, *tail)
            found.append(Variant(label, alone, whole, out, ordered=each.ordered, tail=tail))
    _check_apart(found, recipe)
    return tuple(found)


def _own_params(ref: ModelRef, method: Method | None, recipe: Recipe) -> ModelRef:
    """A model with its own parameters checked, under their names in the signature."""
    if not ref.params:
        return ref
    if method is None:
        raise ParameterError(
            f"{ref.path}: parameters of a model belong to a method", fix="write a method, not `ops`"
        )
    names = {ALIASES.get(key, key): value for key, value in ref.params.items()}
    common = {key: value for key, value in recipe.params.items() if key not in ref.params}
    bound = method.expand({**common, **ref.params}, recipe.compat)
    return replace(ref, params={name: bound[name] for name in names})


def _whole(recipe: Recipe) -> Chain:
    """The chain of some tensor that no selector matches; those of parts are checked too."""
    chains = [build(recipe, None, part) for part in recipe.parts]
    if recipe.method or recipe.ops:
        chains.insert(0, build(recipe, None))
    for each in chains:
        if not combines(each) and not is_apart(each):
            raise ParameterError(
                "the ops leave several task vectors", fix="add a combining op such as `sum`"
            )
    if recipe.parts and any(map(is_apart, chains)):
        raise ParameterError(
            "a method that gives every model a result of its own cannot be mixed with others",
            fix="merge without parts",
        )
    return chains[0]


def build(recipe: Recipe, site: Site | None, part: Part | None = None) -> Chain:
    """The chain of a recipe with expanded parameters at one tensor.

    Parameters
    ----------
    recipe : Recipe
    site : Site or None
        ``None`` for some tensor that no selector matches.
    part : Part, optional
        Of the recipe, where the tensor is one of its own.
    """
    said = recipe if part is None else part

    def here(params: Mapping[str, Any]) -> dict[str, Any]:
        place = site or Site("", ())
        return {key: value_at(value, place) for key, value in params.items()}

    ops: list[Op] = []
    if said.method:
        method, own = METHODS[said.method], [each.params for each in recipe.models]
        if part is None and any(own):
            ops += abreast([method(**here({**said.params, **each})) for each in own])
        else:
            ops += method(**here(said.params))
    return chain(*ops, *(OPS[ref.name](**here(ref.params)) for ref in (*said.ops, *said.then)))


def _place(out: str | None, label: str) -> Path | None:
    if out is None:
        return None
    path = Path(out).expanduser()
    # Values of texts may hold what separates folders.
    label = _UNSAFE.sub("_", label)
    if path.suffix in _FOREIGN:
        raise ParameterError(
            f"{out}: {path.suffix} is not written", fix="name a .safetensors file or a folder"
        )
    if not label:
        return path
    if path.suffix == ".safetensors":
        return path.with_name(f"{path.stem}-{label}{path.suffix}")
    return path / label


def recorded(
    variants: Sequence[Variant],
    models: Sequence[Source],
    weights: Sequence[Any],
    base: Source | None,
    order: Sequence[int],
    first: int | None = None,
) -> tuple[Variant, ...]:
    """Recipes with models in canonical order and the base by its name.

    Where the order of the user decides something, they are stored in that.

    Parameters
    ----------
    order : sequence of int
        The place of each model in the recipe that was asked for.
    first : int, optional
        Which of ``models`` gives config and vocabulary, and so stands first where it is stored.

    Raises
    ------
    ParameterError
        If the recipe asks for a commit of something that is no input.
    """
    place = None if base is None else base.label
    user = tuple(sorted(range(len(models)), key=order.__getitem__))
    led = tuple(sorted(range(len(models)), key=lambda i: i != first)) if first else ()
    revisions = _revisions(variants[0].recipe, [*models, *([] if base is None else [base])])
    found = []
    for each in variants:
        refs = tuple(
            replace(each.recipe.models[given], path=model.label, weight=weight)
            for model, weight, given in zip(models, weights, order, strict=True)
        )
        recipe = replace(
            each.recipe.with_order(order), models=refs, base=place, revisions=revisions
        )
        # Parameters of single models stand in the order of the stack.
        own = any(ref.params for ref in refs)
        ops = (*_whole(recipe), *each.tail) if own else each.ops
        listed = user if each.ordered else led
        found.append(replace(each, recipe=recipe, ops=ops, listed=listed))
    return tuple(found)


def _revisions(recipe: Recipe, opened: Sequence[Source]) -> dict[str, str]:
    """The commits that were opened, all of those among them that were asked for."""
    found = {ref: at for each in opened for ref, at in sorted(each.revisions.items())}
    if idle := sorted(set(recipe.revisions) - set(found)):
        raise ParameterError(
            f"revisions: {idle[0]} is no input that is opened from the Hub",
            fix="leave it out" + (f", or name one of {', '.join(found)}" if found else ""),
        )
    return found


def sweeps(variants: Sequence[Variant]) -> int:
    """Passes that statistics need: one for each op that asks, shared beginnings counted once."""

    def asked(chains: Iterable[Chain]) -> int:
        return len(
            {
                ops[: end + 1]
                for ops in chains
                for end, op in enumerate(ops)
                if op.statistic is not None
            }
        )

    names = {name for each in variants for name in each.chains}
    return max(
        (asked(each.at(name) for each in variants) for name in names),
        default=asked(each.ops for each in variants),
    )
