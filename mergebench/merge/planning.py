"""Making plans: inputs are opened, matched and checked, and every user error surfaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mergebench.checkpoints.destination import staged_bytes
from mergebench.checkpoints.disk import check_space
from mergebench.compute.tiles import Tiling
from mergebench.core.errors import MismatchError, ParameterError
from mergebench.core.site import parse_pattern
from mergebench.merge.align import Aligned, align, in_places
from mergebench.merge.buffers import settle
from mergebench.merge.collected import Collected
from mergebench.merge.configs import check_configs
from mergebench.merge.device.choose import device_of
from mergebench.merge.energy import ranks_by_energy
from mergebench.merge.extraction import for_adapter
from mergebench.merge.limits import DEFAULT_MEMORY, check_places, choose_tiling
from mergebench.merge.mismatch import even_out, extended
from mergebench.merge.on_base import check_fit
from mergebench.merge.opening import open_inputs
from mergebench.merge.origin import check_saved, measure, named_bases
from mergebench.merge.package import Package, package
from mergebench.merge.partition import check_count
from mergebench.merge.placing import check_heard, place
from mergebench.merge.plan import Plan
from mergebench.merge.precision import coarser
from mergebench.merge.selecting import select
from mergebench.merge.spaces import check_base, check_updates, spaces_of
from mergebench.merge.supplied import supply
from mergebench.merge.tying import tie_alike
from mergebench.merge.variants import Variant, make_variants, recorded, split, sweeps
from mergebench.merge.vocab import reconcile
from mergebench.recipe import DTYPES, FORMS, ON_MISMATCH, VOCAB, Recipe
from mergebench.sources import Source


def make_plan(
    recipe: Recipe,
    *,
    sources: Sequence[Source | None] | None = None,
    base: Source | None = None,
    statistics: Sequence[Collected | None] | None = None,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    stream: bool = False,
    device: str = "cpu",
) -> Plan:
    """Open the inputs, match them and decide everything; all user errors surface here.

    Parameters
    ----------
    recipe : Recipe
    sources, base : optional
        Inputs already open (state dicts in memory), in the order of ``recipe.models``; the
        others are ``None``.
    statistics : sequence of Collected or None, optional
        Statistics already open, in the same order; the others are those the recipe names.
    memory : int, bytes, default 512 MiB
        Most anonymous memory to use above the imported libraries.
    workers : int, optional
        Threads; by default as many as cores this process may use, for tiny models one.
    stream : bool, default False
        Read checkpoints on the Hub where they are, instead of downloading them.
    device : str, default cpu
        Where chains are run; see :func:`mergebench.merge.device.choose.device_of`.

    Raises
    ------
    MergebenchError
        For anything the user can fix.
    """
    _check_recipe(recipe)
    there = device_of(device)
    method, variants = make_variants(recipe)
    opened = open_inputs(recipe, sources, base, statistics, stream=stream)
    models, weights, order, collected = (
        opened.models, opened.weights, opened.order, opened.collected
    )  # fmt: skip
    base, form = opened.base, opened.form
    notes = list(opened.notes)
    first = next((each for each in opened.given if each.checkpoint is not None), None)
    notes += [
        *_alone(models, weights, variants),
        *_provenance(opened.given, base, form, allow=recipe.allow_base_mismatch),
        *check_saved(models, base, allow=recipe.allow_base_mismatch),
        *check_configs(models, base, allow=recipe.allow_base_mismatch),
    ]
    models, base, tied = tie_alike(models, base)
    space = check_base(recipe, models, base, form, opened.space)
    check_count(method, len(models))
    check_updates(recipe, variants, space)
    leader = _leader(recipe, form, first if base is None else None, models)
    variants = split(variants, recipe, models, order)
    variants = recorded(variants, models, weights, base, order, leader)
    chosen = select(recipe, models, base)
    spaces = spaces_of(recipe, form, base, space, chosen.parts)
    spoken = reconcile(models, chosen.models, base, _same(first, chosen.models), form, recipe.vocab)
    evened = even_out(
        spoken.models,
        weights,
        spoken.base,
        spoken.first,
        spaces,
        form,
        recipe.on_mismatch,
        lenient=recipe.allow_nonfinite,
    )
    models, base, first = evened.models, spoken.base, spoken.first
    apart, pattern = all(each.tail for each in variants), parse_pattern(recipe.block_pattern)
    aligned = align(models, weights, base, spaces, form, chosen.shapes, pattern, apart=apart)
    if not aligned.items and not aligned.copies:
        raise MismatchError("the inputs have no floating-point tensor to merge")
    aligned, variants, supplied = supply(
        *place(aligned, variants, weights, chosen, evened), collected, models, weights
    )
    aligned = in_places(extended(aligned, evened), order)
    settled = settle(
        aligned, models, base, spaces, allow_nonfinite=recipe.allow_nonfinite, apart=apart
    )
    aligned = check_heard(settled, variants, chosen)
    origin = measure(
        models, base, aligned, spaces, allow=recipe.allow_base_mismatch, fragile=_fragile(variants)
    )
    aligned = for_adapter(aligned, variants, recipe) if form == "lora" else aligned
    pack = partial(
        package, recipe, form, aligned, models, weights, base, first, variants, spoken.sides,
        collected=collected,
    )  # fmt: skip
    built, (tiling, needed, least) = _packed(recipe, pack, aligned, variants, memory, workers)
    if there is not None:
        built = replace(built, notes=(*built.notes, there.note))
    kept = aligned.items if recipe.dtype == "keep" and form == "model" else {}
    notes += [
        *_left(chosen.apart, aligned.order, form),
        *supplied,
        *tied,
        *spoken.notes,
        *evened.notes(),
        *origin.notes,
        *aligned.notes,
        *built.notes,
        *coarser(kept, built.stored, spaces),
    ]
    plan = Plan(
        recipe, method, models, weights, base, aligned, form, variants, built, tiling, needed,
        least, 1 + sweeps(variants), tuple(dict.fromkeys(notes)), origin, evened.odd,
        tuple(each for each in collected if each is not None), there,
    )  # fmt: skip
    return _checked(plan)


def _leader(
    recipe: Recipe, form: str, first: Source | None, models: Sequence[Source]
) -> int | None:
    """Place of the model that config and vocabulary are taken from for want of a base."""
    single = recipe.out is not None and recipe.out.endswith(".safetensors")
    alike = recipe.vocab == recipe.on_mismatch == "error"
    if first is None or form != "model" or (single and alike):
        return None
    return next(place for place, each in enumerate(models) if each.label == first.label)


def _fragile(variants: Sequence[Variant]) -> list[str]:
    """The ops in use that need task vectors of like length."""
    ops = (op for each in variants for chain in each.distinct for op in chain)
    return sorted({op.name for op in ops if op.spec.equal_norms})


def _same(first: Source | None, models: Sequence[Source]) -> Source | None:
    """The model of this label as the steps before have left it."""
    if first is None:
        return None
    return next((each for each in models if each.label == first.label), first)


def _checked(plan: Plan) -> Plan:
    """The plan, if the machine has room for what it writes."""
    inputs = [*plan.models, *([plan.base] if plan.base is not None else [])]
    check_places(plan.variants, [*inputs, *(each.source for each in plan.collected)])
    places = [each.out for each in plan.variants if each.out is not None]
    if places:
        single = plan.package.single_file
        held = sum(staged_bytes(place, single_file=single) for place in places)
        check_space(places[0], plan.write_bytes, held)
    return plan


def _check_recipe(recipe: Recipe) -> None:
    if recipe.out is not None and not recipe.out.strip():
        raise ParameterError("out: no name of an output", fix="give one with -o")
    for what, value, known in (
        ("dtype", recipe.dtype, DTYPES),
        ("as", recipe.form, FORMS),
        ("on_mismatch", recipe.on_mismatch, ON_MISMATCH),
        ("vocab", recipe.vocab, VOCAB),
    ):
        if value not in known:
            raise ParameterError(f"{what}: {value!r}", expected="one of " + ", ".join(known))


def _provenance(
    models: Sequence[Source], base: Source | None, form: str, *, allow: bool
) -> list[str]:
    """What the inputs say of their origins, where that does not fit together."""
    notes = [*named_bases(models), *check_fit(models, base, allow=allow)]
    full = [model for model in models if model.checkpoint is not None]
    configs = [model.checkpoint.config for model in full if model.checkpoint is not None]
    if base is None and form == "model" and any(each != configs[0] for each in configs):
        notes.append(f"config and tokenizer are those of {full[0].label}")
    return notes


def _left(apart: frozenset[str], order: Sequence[str], form: str) -> list[str]:
    names = sorted(apart.intersection(order) if form == "model" else apart)
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    what = "taken from the base unchanged" if form == "model" else "left out"
    return [f"{len(names)} tensors are not selected and {what}: {shown}"]


def _packed(
    recipe: Recipe,
    pack: Callable[..., Package],
    aligned: Aligned,
    variants: Sequence[Variant],
    memory: int,
    workers: int | None,
) -> tuple[Package, tuple[Tiling, int, int]]:
    """The package and its tiling; where ranks are to keep an energy, the data decide them."""
    built = pack()
    chosen = choose_tiling(aligned, variants, built, memory, workers)
    if recipe.energy is not None:
        built = pack(ranks_by_energy(aligned, variants, chosen[0], recipe.energy))
    return built, chosen


def _alone(
    models: Sequence[Source], weights: Sequence[Any], variants: Sequence[Variant]
) -> list[str]:
    """Say that a mean divides the weight of a single model out; refuse base+adapter:weight."""
    means = any(ops[:1] and ops[0].name == "mean" for each in variants for ops in each.distinct)
    if not means or len(models) > 1 or weights[0] == 1.0:
        return []
    label, weight = models[0].label, weights[0]
    base, plus, adapter = label.rpartition("+")
    share = f"{weight:g}" if isinstance(weight, float) else str(weight)
    what = f"{label}: the weight of a single model changes nothing in a mean"
    if models[0].checkpoint is not None and models[0].deltas is not None and plus:
        fix = f"mergebench merge {adapter}:{share} --base {base} -m task_arithmetic"
        raise ParameterError(what, got=share, fix=f"for another share of the adapter: {fix}")
    return [f"{what}; to scale or subtract a task vector: -m task_arithmetic"]
