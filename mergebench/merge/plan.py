"""The plan: everything that headers, configs and parameters decide, before work begins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.checkpoints.writer import Layout
from mergebench.compute.tiles import Load, Tiling, fit
from mergebench.core.delta import LowRank, Replacement, reads
from mergebench.core.errors import (
    MergebenchError,
    MismatchError,
    ParameterError,
    ResourceError,
)
from mergebench.core.tensor import DTYPES, nbytes
from mergebench.merge.align import Aligned, align
from mergebench.merge.method import METHODS, Method
from mergebench.merge.op import OPS, Chain, chain, granularity_of, is_linear
from mergebench.merge.package import Package, package
from mergebench.recipe import OpRef, Recipe
from mergebench.sources import Source, open_source, with_base

DEFAULT_MEMORY = 512 << 20
#: What a search for a threshold may hold (see compute.select), and small buffers.
_STATISTIC, _BUFFERS = 72 << 20, 8 << 20


@dataclass(frozen=True, eq=False)
class Variant:
    """One output: its label among several, expanded parameters, chain and place."""

    label: str
    recipe: Recipe
    ops: Chain
    out: Path | None


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
    """

    recipe: Recipe
    method: Method | None
    models: tuple[Source, ...]
    weights: tuple[float, ...]
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
                    "recipe": each.recipe.to_dict(),
                }
                for each in self.variants
            ],
            "inputs": [
                {"path": m.label, "weight": w, "fingerprint": m.fingerprint}
                for m, w in zip(self.models, self.weights, strict=True)
            ],
            "base": None if self.base is None else self.base.label,
            "tensors": {
                "merged": len(self.aligned.items),
                "copied": {name: self.aligned.reasons[name] for name in self.aligned.copies},
                "tied": {name: list(twins) for name, twins in self.aligned.twins.items()},
            },
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
    sources: Sequence[Source] | None = None,
    base: Source | None = None,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
) -> Plan:
    """Open the inputs, match them and decide everything; all user errors surface here.

    Parameters
    ----------
    recipe : Recipe
    sources, base : optional
        Inputs already open (state dicts in memory), in the order of ``recipe.models``.
    memory : int, bytes, default 512 MiB
        Most anonymous memory to use above the imported libraries.
    workers : int, optional
        Threads; the number of cores this process may use by default.

    Raises
    ------
    MergebenchError
        For anything the user can fix.
    """
    method, variants = _variants(recipe)
    options = ReadOptions(lora_alpha=recipe.lora_alpha, ignore_saved_base=recipe.ignore_saved_base)
    notes: list[str] = []
    if base is None and recipe.base is not None:
        base = open_source(recipe.base, options)
        if base.checkpoint is None:
            raise MismatchError(f"{recipe.base}: the base must be a checkpoint", got="an adapter")
    if base is not None and base.checkpoint is not None:
        options = with_base(options, base.checkpoint)
    opened = sources or [open_source(each.path, options) for each in recipe.models]
    models, weights = _canonical(opened, [each.weight for each in recipe.models])
    space = method.space if method is not None else "delta"
    form = _form(recipe, models, base)
    if base is None and (named := _named_base(models, form, space)) is not None:
        base = open_source(str(named), options)
        notes.append(f"base taken from what the inputs name: {named}")
    if base is None and space == "weight" and any(m.checkpoint is None for m in models):
        space = "delta"
    _check_base(recipe, models, base, form, space)
    _check_count(method, models, variants)
    aligned = align(models, weights, base, space, form)
    if not aligned.items and not aligned.copies:
        raise MismatchError("the inputs have no floating-point tensor to merge")
    built = package(recipe, form, aligned, models, base, all(is_linear(v.ops) for v in variants))
    tiling, needed, least = _memory(aligned, variants, built, memory, workers)
    notes += [*aligned.notes, *built.notes]
    plan = Plan(
        recipe, method, models, weights, base, aligned, form, variants, built, tiling, needed,
        least, 1 + _sweeps(variants), tuple(dict.fromkeys(notes)),
    )  # fmt: skip
    _check_places(plan)
    _check_disk(plan)
    return plan


def _variants(recipe: Recipe) -> tuple[Method | None, tuple[Variant, ...]]:
    method = METHODS[recipe.method] if recipe.method else None
    if method is None and not recipe.ops:
        raise ParameterError("neither a method nor ops are given", fix="add --method")
    then = [OPS[each.name](**each.params) for each in recipe.then]
    found = []
    for label, each in recipe.variants():
        if method is None:
            ops = [OPS[ref.name](**ref.params) for ref in recipe.ops]
            expanded = replace(
                each, ops=tuple(OpRef(one.name, dict(one.params)) for one in ops), params={}
            )
        else:
            params = method.expand(each.params, each.compat)
            ops = list(method.factory(**params))
            expanded = replace(each, params=params)
        refs = tuple(OpRef(one.name, dict(one.params)) for one in then)
        whole = chain(*ops, *then)
        if not any(one.spec.reduces for one in whole):
            raise ParameterError(
                "the ops leave several task vectors", fix="add a combining op such as `sum`"
            )
        out = _place(recipe.out, label)
        # The place is not part of what decides the bytes.
        found.append(Variant(label, replace(expanded, then=refs, out=None), whole, out))
    if len({str(each.out) for each in found}) < len(found) and recipe.out:
        raise ParameterError("two outputs would have the same place", fix="list each value once")
    return method, tuple(found)


def _place(out: str | None, label: str) -> Path | None:
    if out is None:
        return None
    path = Path(out).expanduser()
    if not label:
        return path
    if path.suffix == ".safetensors":
        return path.with_name(f"{path.stem}-{label}{path.suffix}")
    return path / label


def _canonical(
    opened: Sequence[Source], weights: Sequence[float]
) -> tuple[tuple[Source, ...], tuple[float, ...]]:
    order = sorted(range(len(opened)), key=lambda i: (opened[i].fingerprint, weights[i], i))
    return tuple(opened[i] for i in order), tuple(weights[i] for i in order)


def _form(recipe: Recipe, models: Sequence[Source], base: Source | None) -> str:
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
    if model.config:
        return model.config.get("base_model_name_or_path")
    if model.checkpoint is not None and model.checkpoint.config is not None:
        return model.checkpoint.config.get("_name_or_path")
    return None


def _check_base(
    recipe: Recipe, models: Sequence[Source], base: Source | None, form: str, space: str
) -> None:
    if base is not None:
        return
    full = [model.label for model in models if model.checkpoint is not None]
    what = recipe.method or "this chain"
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


def _check_count(
    method: Method | None, models: Sequence[Source], variants: Sequence[Variant]
) -> None:
    if method is None:
        return
    least, most = method.models
    if len(models) < least or (most is not None and len(models) > most):
        limit = f"{least} or more" if most is None else f"{least} to {most}"
        raise ParameterError(
            f"{method.name}: number of models", got=str(len(models)), expected=limit
        )


def _sweeps(variants: Sequence[Variant]) -> int:
    """Passes that statistics need: one for each op that asks, shared beginnings counted once."""
    asked = {
        each.ops[: end + 1]
        for each in variants
        for end, op in enumerate(each.ops)
        if op.statistic is not None
    }
    return len(asked)


def _memory(
    aligned: Aligned,
    variants: Sequence[Variant],
    built: Package,
    budget: int,
    workers: int | None,
) -> tuple[Tiling, int, int]:
    items = list(aligned.items.values())
    statistic = any(op.statistic is not None for each in variants for op in each.ops)
    fixed = _BUFFERS + (_STATISTIC if statistic else 0) + built.dense_bytes
    largest, where = max(
        ((_unit(variants, item.site.size, item.site.row), item.site.name) for item in items),
        default=(1, ""),
    )
    load = Load(
        models=max((len(item.deltas) for item in items), default=1),
        outputs=len(variants),
        itemsize=max((item.dtype.itemsize for item in items), default=4),
        out_itemsize=max(DTYPES[spec.dtype].itemsize for spec in built.specs),
        unit=largest,
        fixed=fixed,
        largest=max((item.site.size for item in items), default=1),
    )
    tiling, least = fit(load, budget, workers or cores())
    needed = load.bytes(tiling)
    if needed > budget:
        raise ResourceError(
            f"this merge needs at least {_mib(least)}",
            got=f"--memory {_mib(budget)}",
            fix=(f"its largest piece is a {_piece(variants)} of {where!r}; " if where else "")
            + f"give --memory {-(-least // (1 << 20))}MiB",
        )
    return tiling, needed, least


def _unit(variants: Sequence[Variant], size: int, row: int) -> int:
    return Tiling().unit(_piece(variants), size, row)


def _piece(variants: Sequence[Variant]) -> str:
    return granularity_of(tuple(op for each in variants for op in each.ops))


def _mib(count: int) -> str:
    return f"{-(-count // (1 << 20))} MiB"


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _check_places(plan: Plan) -> None:
    """An output may neither replace an input nor stand inside of one, nor around it."""
    names = [each.path for each in plan.recipe.models]
    names += [plan.recipe.base] if plan.recipe.base else []
    paths = [Path(part).expanduser() for name in names for part in (name, *name.split("+"))]
    taken = [path.resolve() for path in paths if path.exists()]
    for variant in plan.variants:
        if variant.out is None:
            continue
        out = variant.out.resolve()
        for path in taken:
            if out == path or (path.is_dir() and path in out.parents) or out in path.parents:
                raise MergebenchError(
                    f"{variant.out}: the output would replace or lie inside the input {path}",
                    fix="give another place with -o",
                )


def _check_disk(plan: Plan) -> None:
    out = plan.variants[0].out
    if out is None:
        return
    where = out.absolute()
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < plan.write_bytes:
        raise ResourceError(
            f"{out}: not enough disk, {plan.write_bytes:,} bytes are needed and {free:,} are free",
            fix="free space or give another place with -o",
        )
