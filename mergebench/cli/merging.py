"""``merge``, ``plan`` and ``run``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console, reports, trying
from mergebench.cli import options as o
from mergebench.core.errors import EXIT_FINDINGS

if TYPE_CHECKING:
    from mergebench.merge.many.where import Where
    from mergebench.merge.outcome import Written
    from mergebench.merge.plan import Plan
    from mergebench.merge.readings import Row
    from mergebench.merge.variants import Variant
    from mergebench.recipe import ModelRef, Recipe


def merge(
    models: o.Models,
    base: o.Base = None,
    method: o.MethodName = None,
    param: o.Params = None,
    then: o.Then = None,
    method_for: o.MethodFor = None,
    where: o.Where = None,
    task: o.Task = None,
    statistics: o.Statistics = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    block_pattern: o.BlockPattern = None,
    compat: o.Compat = None,
    dtype: o.Dtype = "keep",
    form: o.Form = "auto",
    shard_size: o.ShardSize = None,
    lora_alpha: o.LoraAlpha = None,
    ignore_saved_base: o.IgnoreSavedBase = False,
    part: o.Part = None,
    target: o.Target = None,
    rank: o.Rank = None,
    energy: o.Energy = None,
    whole: o.Whole = None,
    on_mismatch: o.OnMismatch = "error",
    vocab: o.Vocab = "error",
    allow_base_mismatch: o.AllowBaseMismatch = False,
    allow_nonfinite: o.AllowNonfinite = False,
    out: o.Out = None,
    force: o.Force = False,
    memory: o.Memory = "512MiB",
    workers: o.Workers = None,
    kernels: o.Kernels = "auto",
    page_cache: o.PageCache = "auto",
    device: o.Device = "cpu",
    cache: o.Cache = "keep",
    executor: o.Executor = "threads",
    scheduler: o.Scheduler = None,
    worker: o.Worker = None,
    wait: o.Wait = 600,
    dry_run: o.DryRun = False,
    check: o.Check = False,
    report: o.Report = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Merge models, adapters or task vectors into one.

    Full checkpoints are merged as task vectors (fine-tuned minus --base) unless the method
    works on weights; adapters are task vectors already, and give an adapter.

    Examples:

    \b
      mergebench merge a.safetensors b.safetensors --method breadcrumbs
      mergebench merge ft1:0.5 ft2 --base base -m ties -p density=0.2 -p lam=0.5,1 -o merged
    """
    recipe = _recipe(
        models, base, method, param, then, method_for, compat, dtype, form, shard_size, lora_alpha,
        out, ignore_saved_base, part, target, rank, energy, whole, where, include, exclude,
        on_mismatch, vocab, allow_base_mismatch, allow_nonfinite, block_pattern, task, statistics,
    )  # fmt: skip
    do(
        recipe, force, memory, workers, dry_run, as_json, quiet, check, report, cache=cache,
        where=_where(executor, scheduler, worker, wait, device),
    )  # fmt: skip


def plan(
    models: o.Models,
    base: o.Base = None,
    method: o.MethodName = None,
    param: o.Params = None,
    then: o.Then = None,
    method_for: o.MethodFor = None,
    where: o.Where = None,
    task: o.Task = None,
    statistics: o.Statistics = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    block_pattern: o.BlockPattern = None,
    compat: o.Compat = None,
    dtype: o.Dtype = "keep",
    form: o.Form = "auto",
    shard_size: o.ShardSize = None,
    lora_alpha: o.LoraAlpha = None,
    ignore_saved_base: o.IgnoreSavedBase = False,
    part: o.Part = None,
    target: o.Target = None,
    rank: o.Rank = None,
    energy: o.Energy = None,
    whole: o.Whole = None,
    on_mismatch: o.OnMismatch = "error",
    vocab: o.Vocab = "error",
    allow_base_mismatch: o.AllowBaseMismatch = False,
    allow_nonfinite: o.AllowNonfinite = False,
    out: o.Out = None,
    memory: o.Memory = "512MiB",
    workers: o.Workers = None,
    cache: o.Cache = "keep",
    as_json: o.Json = False,
) -> None:
    """Show what a merge would do, and check it, without doing it: `merge --dry-run`.

    Examples:

    \b
      mergebench plan a.safetensors b.safetensors --method breadcrumbs
      mergebench plan ft1 ft2 --base base --method ties --memory 256MiB --json
    """
    recipe = _recipe(
        models, base, method, param, then, method_for, compat, dtype, form, shard_size, lora_alpha,
        out, ignore_saved_base, part, target, rank, energy, whole, where, include, exclude,
        on_mismatch, vocab, allow_base_mismatch, allow_nonfinite, block_pattern, task, statistics,
    )  # fmt: skip
    do(recipe, True, memory, workers, True, as_json, False, cache=cache)


def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe, YAML or JSON, an output, or a configuration of mergekit.",
            show_default=False,
        ),
    ],
    allow_base_mismatch: o.AllowBaseMismatch = False,
    allow_nonfinite: o.AllowNonfinite = False,
    out: o.Out = None,
    force: o.Force = False,
    memory: o.Memory = "512MiB",
    workers: o.Workers = None,
    page_cache: o.PageCache = "auto",
    device: o.Device = "cpu",
    cache: o.Cache = "keep",
    executor: o.Executor = "threads",
    scheduler: o.Scheduler = None,
    worker: o.Worker = None,
    wait: o.Wait = 600,
    dry_run: o.DryRun = False,
    check: o.Check = False,
    report: o.Report = False,
    print_recipe: o.PrintRecipe = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Run a recipe, such as the mergebench_recipe.yaml of an earlier output, or a mergekit.yml.

    Examples:

    \b
      mergebench run merged/mergebench_recipe.yaml --dry-run
      mergebench run mergekit.yml -o merged
    """
    from mergebench.manifest import RECIPE
    from mergebench.merge.method import METHODS
    from mergebench.mergekit import read_either

    found = read_either(recipe / RECIPE if recipe.is_dir() else recipe, METHODS)
    read = replace(
        found.recipe,
        out=out or found.recipe.out,
        allow_base_mismatch=allow_base_mismatch or found.recipe.allow_base_mismatch,
        allow_nonfinite=allow_nonfinite or found.recipe.allow_nonfinite,
    )
    if print_recipe:
        if not quiet:
            for text in found.notes:
                console.note(text)
        console.say_json(read.to_dict()) if as_json else console.say(read.to_yaml().rstrip())
        return
    do(
        _with_out(read),
        force, memory, workers, dry_run, as_json, quiet, check, report, found.notes, cache,
        _where(executor, scheduler, worker, wait, device),
    )  # fmt: skip


def _recipe(
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
    from mergebench.core.errors import ParameterError, did_you_mean
    from mergebench.recipe import (
        DTYPES,
        FORMS,
        ON_MISMATCH,
        VOCAB,
        ModelRef,
        Recipe,
        parse_op,
        parse_part,
        with_rules,
    )
    from mergebench.sources import split_weight

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
    return _with_out(with_rules(recipe, where or ()))


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
    from mergebench.recipe import parse_assignment

    params: dict[str, Any] = {}
    for text in texts:
        key, value = parse_assignment(text)
        if key in params:
            raise ParameterError(f"parameter {key!r} is given twice", fix=f"write -p {key}=a,b")
        parts = tuple(part.strip() for part in value.split(","))
        params[key] = parts if len(parts) > 1 else parts[0]
    return params


def _with_out(recipe: Recipe) -> Recipe:
    """Without a place given: a file if all inputs are files, else a folder."""
    if recipe.out is not None:
        return recipe
    files = all(Path(each.path).expanduser().is_file() for each in recipe.models)
    whole = recipe.shard_size is None
    return replace(recipe, out="merged.safetensors" if files and whole else "merged")


def do(
    recipe: Recipe,
    force: bool,
    memory: str,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    check: bool = False,
    report: bool = False,
    notes: tuple[str, ...] = (),
    cache: str = "keep",
    where: Where | None = None,
) -> None:
    """Plan a recipe, and unless it is only to be shown, run it and say what came out."""
    from mergebench.merge.foreseen import foresee
    from mergebench.merge.many.where import Where
    from mergebench.merge.plan import make_plan

    started = perf_counter()
    device = "cpu" if where is None else where.device
    if not dry_run and device == "cpu":
        foresee(recipe)
    budget, stream = o.size("--memory", memory), o.streams(cache)
    made = make_plan(recipe, memory=budget, workers=workers, stream=stream, device=device)
    made = replace(made, notes=(*notes, *made.notes)) if notes else made
    if dry_run:
        if as_json:
            console.say_json(made.to_json())
        else:
            show_plan(made)
        return
    place = where or Where()
    place.check(made, force=force)
    if check:
        trying.need_library(made)
    if not quiet:
        for text in made.notes:
            console.note(text)
    with console.bar(quiet or as_json) as progress:
        note = None if quiet else console.note
        written = place.execute(
            made, memory=budget, stream=stream, force=force, progress=progress, note=note
        )
    seconds = perf_counter() - started
    if not as_json and not quiet:
        _summary(made, written, seconds)
    if report and not as_json:
        for each in written:
            reports.show_rows(_rows(made, each))
    checked = trying.check_outputs(made, workers, quiet, as_json) if check else []
    if as_json:
        data = {"seconds": round(seconds, 3), "outputs": [_plain(made, w) for w in written]}
        console.say_json(data | ({"checks": checked} if check else {}))
    if any(each["findings"] for each in checked):
        raise typer.Exit(EXIT_FINDINGS)


def _where(
    executor: str, scheduler: str | None, worker: str | None, wait: float, device: str
) -> Where:
    from mergebench.merge.many.where import Where

    return Where(executor, scheduler, worker, wait, device)


def _rows(made: Plan, written: Written) -> list[Row]:
    from mergebench.merge.readings import rows

    return rows(written.readings, made)


def _plain(made: Plan, written: Written) -> dict[str, Any]:
    ranks = {name: module.own_rank for name, module in made.package.modules.items()}
    return {
        "label": written.label,
        "path": str(written.path),
        "bytes": written.bytes,
        "residuals": dict(written.residuals),
        **({"ranks": ranks} if ranks else {}),
        "digests": dict(written.digests),
        "nonfinite": {name: dict(counts) for name, counts in written.nonfinite.items()},
        "readings": [row.to_json() for row in _rows(made, written)],
    }


#: Most chains of one output that a plan shows.
_CHAINS = 6
#: Most characters of an op or a weight: `--json` has all.
_TEXT = 300
#: Most modules whose residuals are shown.
_RESIDUALS = 20
_FORMS = {"model": "model", "lora": "LoRA adapter", "delta": "task vector"}


def _summary(made: Plan, written: list[Written], seconds: float) -> None:
    merged, copied = len(made.aligned.items), len(made.aligned.copies)
    for each in written:
        console.say(f"{each.path}: {_FORMS[made.form]}, {console.size(each.bytes)}")
        if each.residuals:
            name, worst = max(each.residuals.items(), key=lambda pair: pair[1])
            squares = [value * value for value in each.residuals.values()]
            root = (sum(squares) / len(squares)) ** 0.5
            console.say(
                f"  truncated to rank {_rank(made)}: relative residual {root:.3g} over "
                f"{len(squares)} modules, worst {worst:.3g} ({name}); --as delta loses nothing"
            )
            _show_residuals(made, each)
        for text in reports.spans(_rows(made, each)):
            console.say(f"  {text}")
    for name, counts in written[0].nonfinite.items():
        shown = ", ".join(f"{count} of {label}" for label, count in counts.items())
        console.say(f"  not finite in {name}, passed through as NaN: {shown}")
    console.say(
        f"merged {merged} tensors ({console.number(made.entries)} entries), copied {copied}, "
        f"{made.passes} pass{'es' if made.passes > 1 else ''}, {seconds:.1f} s"
    )


def _show_residuals(made: Plan, written: Written) -> None:
    """Module by module, where a rank or an energy was asked for."""
    if made.recipe.rank is None and made.recipe.energy is None:
        return
    worst = sorted(written.residuals.items(), key=lambda pair: -pair[1])
    for name, value in worst[:_RESIDUALS]:
        module = made.package.modules[name]
        console.say(f"    {name}: rank {module.own_rank} of {module.full_rank}, lost {value:.3g}")
    if len(worst) > _RESIDUALS:
        console.say(f"    {len(worst) - _RESIDUALS} more with less lost (--json lists all)")


def _rank(made: Plan) -> str:
    ranks = {module.own_rank for module in made.package.modules.values()}
    return str(max(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def _weight(weight: Any) -> str:
    return f"{weight:g}" if isinstance(weight, float) else _short(str(weight))


def _short(text: str) -> str:
    """As much of a text as a line of a plan is for."""
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}… ({len(text):,} characters)"


def _chains(variant: Variant) -> Iterator[tuple[str, str]]:
    """Rows for the chains of an output, with the tensors they are for if there are several."""
    title = variant.label or "ops"
    for chain in variant.distinct[:_CHAINS]:
        names = [name for name, ops in variant.chains.items() if ops == chain]
        where = f"  ({len(names)} tensors such as {names[0]})" if names else ""
        yield title, " → ".join(_short(str(each)) for each in chain) + where
    if len(variant.distinct) > _CHAINS:
        yield title, f"… {len(variant.distinct) - _CHAINS} more (--json lists all)"


def show_plan(made: Plan) -> None:
    """A plan as a table."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    weights = ", ".join(f"{each.path} × {_weight(each.weight)}" for each in made.recipe.models)
    table.add_row("inputs", weights)
    table.add_row("base", "none" if made.base is None else made.base.label)
    for each in made.variants:
        for title, ops in _chains(each):
            table.add_row(title, ops)
    places = ", ".join(str(each.out) for each in made.variants)
    table.add_row("output", f"{_FORMS[made.form]}: {places}")
    files = ", ".join(file.name for file in made.layout.files)
    if not made.package.single_file:
        table.add_row("files", files)
    aligned = made.aligned
    for each_part in made.parts:
        what = f"{each_part['select']}: {each_part['method'] or 'a chain'}"
        table.add_row("part", f"{what}, {each_part['tensors']} tensors")
    table.add_row("merged", f"{len(aligned.items)} tensors, {made.entries:,} entries")
    reasons: dict[str, list[str]] = {}
    for name in aligned.copies:
        reasons.setdefault(aligned.reasons[name], []).append(name)
    for reason, copied in reasons.items():
        shown = ", ".join(copied[:4]) + (", …" if len(copied) > 4 else "")
        table.add_row("copied", f"{len(copied)} tensors ({reason}): {shown}")
    for name, twins in aligned.twins.items():
        table.add_row("tied", f"{', '.join(twins)} = {name}, merged once")
    table.add_row("passes", f"{made.passes} over {console.size(made.read_bytes)} of input")
    table.add_row(
        "memory",
        f"{console.size(made.memory)} with {made.tiling.workers} workers, at least "
        f"{console.size(made.least_memory)}",
    )
    table.add_row("disk", console.size(made.write_bytes))
    for each in made.variants:
        if each.out is not None and each.out.exists():
            table.add_row("note", f"{each.out} exists; only --force would replace it")
    if made.origin.norms:
        norms = ", ".join(f"{norm:.3g} ({label})" for label, norm in made.origin.norms.items())
        unequal = made.origin.unequal
        apart = "" if unequal is None else f"; longest / shortest {unequal:.2g}"
        table.add_row("norms", f"‖τ‖ ≈ {norms}{apart}")
    for text in made.notes:
        table.add_row("note", text)
    console.out().print(table)
