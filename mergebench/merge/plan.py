"""The plan: everything that headers, configs and parameters decide, before work begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.adapters_zoo.targets import target_named
from mergebench.checkpoints.disk import check_space
from mergebench.checkpoints.staging import staged_bytes
from mergebench.checkpoints.writer import Layout
from mergebench.compute.tiles import Tiling
from mergebench.core.delta import LowRank, Replacement, reads
from mergebench.core.errors import MismatchError, ParameterError
from mergebench.core.rules import parse_weight
from mergebench.core.schedule import is_schedule, to_plain
from mergebench.core.site import parse_pattern
from mergebench.core.tensor import nbytes
from mergebench.merge.align import Aligned, align, in_places
from mergebench.merge.buffers import settle
from mergebench.merge.collected import Collected, open_all
from mergebench.merge.configs import check_configs
from mergebench.merge.energy import ranks_by_energy
from mergebench.merge.extraction import for_adapter
from mergebench.merge.limits import DEFAULT_MEMORY, check_places, choose_tiling
from mergebench.merge.method import METHODS, Method
from mergebench.merge.mismatch import Odd, even_out, extended
from mergebench.merge.on_base import check_fit
from mergebench.merge.origin import Origin, check_saved, measure, named_bases
from mergebench.merge.package import Package, package
from mergebench.merge.partition import check_count, methods_of
from mergebench.merge.precision import coarser
from mergebench.merge.selecting import check_heard, place, select
from mergebench.merge.spaces import Space, Spaces
from mergebench.merge.supplied import supply
from mergebench.merge.tying import tie_alike
from mergebench.merge.variants import Variant, make_variants, recorded, split, sweeps
from mergebench.merge.vocab import reconcile
from mergebench.recipe import DTYPES, FORMS, ON_MISMATCH, VOCAB, Recipe
from mergebench.sources import Source, content, open_source, with_base


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge that only waits to be run.

    Attributes
    ----------
    recipe : Recipe
        As asked.
    method : Method or None
        ``None`` for a chain written out.
    models : tuple of Source
        In canonical order: by fingerprint, so that the order of the command line does not
        change a bit of the result.
    aligned : Aligned
        The fate of every tensor.
    form : model, lora or delta
    variants : tuple of Variant
    package : Package
        Tensors, layout and companions of each output.
    tiling : Tiling
    memory, least_memory : int
        Bytes the merge will hold, and the least that any tiling needs.
    passes : int
        How often the inputs are read.
    origin : Origin
        How the models relate to the base, from a sample.
    odd : tuple of Odd
        Tensors that do not match in all inputs, and what is done with them.
    collected : tuple of Collected
        The statistics of every model, if a method asks for them.
    """

    recipe: Recipe
    method: Method | None
    models: tuple[Source, ...]
    weights: tuple[Any, ...]
    base: Source | None
    aligned: Aligned
    form: str
    variants: tuple[Variant, ...]
    package: Package
    tiling: Tiling
    memory: int
    least_memory: int
    passes: int
    notes: tuple[str, ...]
    origin: Origin
    odd: tuple[Odd, ...] = ()
    collected: tuple[Collected, ...] = ()

    @property
    def layout(self) -> Layout:
        """Files and offsets of each output."""
        return self.package.layout

    @property
    def entries(self) -> int:
        """Entries that are merged, per output."""
        return sum(item.site.size for item in self.aligned.items.values())

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of input that one pass reads."""
        tensors = {
            id(tensor): tensor
            for item in self.aligned.items.values()
            for delta in item.deltas
            if delta is not None
            for tensor in reads(delta)
        }
        copied = sum(nbytes(t.dtype, t.shape) for t in self.aligned.copies.values())
        return copied + sum(nbytes(t.dtype, t.shape) for t in tensors.values())

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What the parts of the recipe select, their methods, and how many tensors each has."""
        counts = Counter(item.part for item in self.aligned.items.values())
        return [
            {"select": each.select, "method": each.method, "tensors": counts[str(number)]}
            for number, each in enumerate(self.recipe.parts, start=1)
        ]

    @property
    def write_bytes(self) -> int:
        """Bytes of output, over all variants."""
        return self.layout.total_bytes * len(self.variants)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "method": self.recipe.method or None,
            "form": self.form,
            "outputs": [
                {
                    "label": each.label,
                    "path": None if each.out is None else str(each.out),
                    "ops": [str(op) for op in each.ops],
                    "chains": [
                        {
                            "ops": [str(op) for op in chain],
                            "tensors": [n for n, ops in each.chains.items() if ops == chain],
                        }
                        for chain in (each.distinct if each.chains else ())
                    ],
                    "recipe": each.stored.to_dict(),
                }
                for each in self.variants
            ],
            "inputs": [
                {"path": m.label, "weight": to_plain(w), "fingerprint": m.fingerprint}
                for m, w in zip(self.models, self.weights, strict=True)
            ],
            **({"statistics": [each.label for each in self.collected]} if self.collected else {}),
            "base": None if self.base is None else self.base.label,
            "origin": self.origin.to_json(),
            "mismatches": [each.to_json() for each in self.odd],
            "tensors": {
                "merged": len(self.aligned.items),
                "copied": {name: self.aligned.reasons[name] for name in self.aligned.copies},
                "tied": {name: list(twins) for name, twins in self.aligned.twins.items()},
            },
            "parts": self.parts,
            "entries": self.entries,
            "passes": self.passes,
            "read_bytes": self.read_bytes * self.passes,
            "write_bytes": self.write_bytes,
            "memory": self.memory,
            "least_memory": self.least_memory,
            "workers": self.tiling.workers,
            "files": [file.name for file in self.layout.files],
            "notes": list(self.notes),
        }


def make_plan(
    recipe: Recipe,
    *,
    sources: Sequence[Source | None] | None = None,
    base: Source | None = None,
    statistics: Sequence[Collected | None] | None = None,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    stream: bool = False,
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
        Threads; the number of cores this process may use by default.
    stream : bool, default False
        Read checkpoints on the Hub where they are, instead of downloading them.

    Raises
    ------
    MergebenchError
        For anything the user can fix.
    """
    _check_recipe(recipe)
    method, variants = make_variants(recipe)
    options = ReadOptions(
        lora_alpha=recipe.lora_alpha,
        ignore_saved_base=recipe.ignore_saved_base,
        part=recipe.part,
        revisions=recipe.revisions,
        stream=stream,
    )
    notes: list[str] = []
    weights_given = [parse_weight(each.weight, each.path) for each in recipe.models]
    if base is None and recipe.base is not None:
        base = _open_base(recipe.base, options)
    if base is not None and base.checkpoint is not None:
        options = with_base(options, base.checkpoint)
    opened = _open_models(recipe, sources, options)
    form = _form(recipe, opened, base)
    space = _space(recipe, form, base)
    if base is None and (named := _named_base(opened, form, space)) is not None:
        base = _open_base(str(named), options)
        assert base.checkpoint is not None
        notes.append(f"base taken from what the inputs name: {named}")
        # Adapters are read again, now that the names and shapes of the base are known.
        options = with_base(options, base.checkpoint)
        opened = _open_models(recipe, sources, options)
        space = _space(recipe, form, base)
    files = open_all([each.statistics for each in recipe.models], statistics)
    models, weights, order = _canonical(opened, recipe, weights_given, files)
    collected = tuple(files[place] for place in order)
    first = next((each for each in opened if each.checkpoint is not None), None)
    notes += [
        *_alone(models, weights, variants),
        *_provenance(opened, base, form, allow=recipe.allow_base_mismatch),
        *check_saved(models, base, allow=recipe.allow_base_mismatch),
        *check_configs(models, base, allow=recipe.allow_base_mismatch),
    ]
    models, base, tied = tie_alike(models, base)
    space = _check_base(recipe, models, base, form, space)
    check_count(method, len(models))
    _check_updates(recipe, variants, space)
    leader = _leader(recipe, form, first if base is None else None, models)
    variants = split(variants, recipe, models, order)
    variants = recorded(variants, models, weights, base, order, leader)
    chosen = select(recipe, models, base)
    spaces = _spaces(recipe, form, base, space, chosen.parts)
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
        tuple(each for each in collected if each is not None),
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


def _open_models(
    recipe: Recipe, given: Sequence[Source | None] | None, options: ReadOptions
) -> list[Source]:
    ready = given or [None] * len(recipe.models)
    return [
        source or open_source(each.path, options)
        for source, each in zip(ready, recipe.models, strict=True)
    ]


def _open_base(reference: str, options: ReadOptions) -> Source:
    base = open_source(reference, options)
    if base.checkpoint is None:
        raise MismatchError(f"{reference}: the base must be a checkpoint", got="an adapter")
    if base.deltas is not None:
        raise MismatchError(
            f"{reference}: the base must be a checkpoint alone",
            got="one with an adapter",
            fix=f"write it first: mergebench merge {reference} -o applied",
        )
    return base


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


def _canonical(
    opened: Sequence[Source],
    recipe: Recipe,
    weights: Sequence[Any],
    files: Sequence[Collected | None] = (),
) -> tuple[tuple[Source, ...], tuple[Any, ...], tuple[int, ...]]:
    """Models and weights in an order of their own, and the place where each of them was given."""
    marks = [source.fingerprint for source in opened]
    # A fingerprint samples; models that differ elsewhere only are told apart by all they hold.
    full = [content(s) if marks.count(s.fingerprint) > 1 else "" for s in opened]
    own = [
        repr([sorted(each.to_dict().get("params", {}).items()), _of_parts(recipe, place)])
        + (file.source.fingerprint if (file := dict(enumerate(files)).get(place)) else "")
        for place, each in enumerate(recipe.models)
    ]
    keys = list(zip(marks, full, map(_rank, weights), own, strict=True))
    order = tuple(sorted(range(len(opened)), key=lambda place: (*keys[place], place)))
    return tuple(opened[i] for i in order), tuple(weights[i] for i in order), order


def _of_parts(recipe: Recipe, place: int) -> list[str]:
    """The weights of a model that are for single parts."""
    return [str(part.weights[place]) for part in recipe.parts if part.weights]


def _left(apart: frozenset[str], order: Sequence[str], form: str) -> list[str]:
    names = sorted(apart.intersection(order) if form == "model" else apart)
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    what = "taken from the base unchanged" if form == "model" else "left out"
    return [f"{len(names)} tensors are not selected and {what}: {shown}"]


def _rank(weight: Any) -> tuple[bool, float, str]:
    """Numbers by size, before schedules."""
    plain = not is_schedule(weight)
    return (not plain, weight if plain else 0.0, "" if plain else str(weight))


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


def _form(recipe: Recipe, models: Sequence[Source], base: Source | None) -> str:
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


def _space(recipe: Recipe, form: str, base: Source | None) -> Space:
    """What is combined: displacements, if anything needs them, or weights."""
    found = {_space_of(method, form, base) for method in methods_of(recipe)}
    return "delta" if "delta" in found else "weight"


def _spaces(
    recipe: Recipe, form: str, base: Source | None, space: Space, parts: Mapping[str, int]
) -> Spaces:
    """What is combined of each tensor, where that differs between parts."""
    own = [_space_of(method, form, base) for method in methods_of(recipe)]
    if base is None or len(set(own)) == 1:
        return Spaces(space)
    of_parts = own[-len(recipe.parts) :]
    return Spaces(own[0], {name: of_parts[number] for name, number in parts.items()})


def _space_of(method: Method | None, form: str, base: Source | None) -> Space:
    if method is None or form != "model":
        # What is written is a displacement, so displacements are combined.
        return "delta"
    if method.space == "either":
        return "weight" if base is None else "delta"
    return method.space


def _named_base(models: Sequence[Source], form: str, space: str) -> Path | None:
    """A base that the inputs name and that lies on this machine."""
    wanted = form == "model" and any(model.checkpoint is None for model in models)
    wanted = wanted or (space == "delta" and any(m.checkpoint is not None for m in models))
    if not wanted:
        return None
    names = {_origin(model) for model in models}
    name = names.pop() if len(names) == 1 else None
    if not name:
        return None
    path = Path(name).expanduser()
    return path if path.is_dir() or path.is_file() else None


def _origin(model: Source) -> str | None:
    name = None
    if model.config:
        name = model.config.get("base_model_name_or_path")
    elif model.checkpoint is not None and model.checkpoint.config is not None:
        name = model.checkpoint.config.get("_name_or_path")
    return name if isinstance(name, str) else None


def _check_base(
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


def _check_updates(recipe: Recipe, variants: Sequence[Variant], space: str) -> None:
    """Refuse ops on updates that would get whole weights."""
    if space != "weight":
        return
    for op in (op for each in variants for op in each.ops):
        if op.spec.of_updates:
            raise ParameterError(
                f"{op.name} works on updates, and {recipe.method} gives whole weights here",
                fix="use a method on task vectors: --method task_arithmetic with --base",
            )


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
