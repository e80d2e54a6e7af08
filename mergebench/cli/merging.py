"""``merge``, ``plan`` and ``run``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro
from mergebench.cli.executing import do, where_of
from mergebench.cli.recipes import recipe_of, with_out


def merge(
    models: o.Models,
    base: o.Base = None,
    method: ro.MethodName = None,
    param: ro.Params = None,
    then: ro.Then = None,
    method_for: ro.MethodFor = None,
    where: ro.Where = None,
    task: ro.Task = None,
    statistics: ro.Statistics = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    block_pattern: ro.BlockPattern = None,
    compat: ro.Compat = None,
    dtype: ro.Dtype = "keep",
    form: ro.Form = "auto",
    shard_size: ro.ShardSize = None,
    lora_alpha: ro.LoraAlpha = None,
    ignore_saved_base: ro.IgnoreSavedBase = False,
    part: ro.Part = None,
    target: ro.Target = None,
    rank: ro.Rank = None,
    energy: ro.Energy = None,
    whole: ro.Whole = None,
    on_mismatch: ro.OnMismatch = "error",
    vocab: ro.Vocab = "error",
    allow_base_mismatch: ro.AllowBaseMismatch = False,
    allow_nonfinite: ro.AllowNonfinite = False,
    out: o.Out = None,
    force: o.Force = False,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    kernels: mo.Kernels = "auto",
    page_cache: mo.PageCache = "auto",
    device: mo.Device = "cpu",
    cache: mo.Cache = "keep",
    executor: mo.Executor = "threads",
    scheduler: mo.Scheduler = None,
    worker: mo.Worker = None,
    wait: mo.Wait = 600,
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
    recipe = recipe_of(
        models, base, method, param, then, method_for, compat, dtype, form, shard_size, lora_alpha,
        out, ignore_saved_base, part, target, rank, energy, whole, where, include, exclude,
        on_mismatch, vocab, allow_base_mismatch, allow_nonfinite, block_pattern, task, statistics,
    )  # fmt: skip
    do(
        recipe, force, memory, workers, dry_run, as_json, quiet, check, report, cache=cache,
        where=where_of(executor, scheduler, worker, wait, device),
    )  # fmt: skip


def plan(
    models: o.Models,
    base: o.Base = None,
    method: ro.MethodName = None,
    param: ro.Params = None,
    then: ro.Then = None,
    method_for: ro.MethodFor = None,
    where: ro.Where = None,
    task: ro.Task = None,
    statistics: ro.Statistics = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    block_pattern: ro.BlockPattern = None,
    compat: ro.Compat = None,
    dtype: ro.Dtype = "keep",
    form: ro.Form = "auto",
    shard_size: ro.ShardSize = None,
    lora_alpha: ro.LoraAlpha = None,
    ignore_saved_base: ro.IgnoreSavedBase = False,
    part: ro.Part = None,
    target: ro.Target = None,
    rank: ro.Rank = None,
    energy: ro.Energy = None,
    whole: ro.Whole = None,
    on_mismatch: ro.OnMismatch = "error",
    vocab: ro.Vocab = "error",
    allow_base_mismatch: ro.AllowBaseMismatch = False,
    allow_nonfinite: ro.AllowNonfinite = False,
    out: o.Out = None,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    cache: mo.Cache = "keep",
    as_json: o.Json = False,
) -> None:
    """Show what a merge would do, and check it, without doing it: `merge --dry-run`.

    Examples:

    \b
      mergebench plan a.safetensors b.safetensors --method breadcrumbs
      mergebench plan ft1 ft2 --base base --method ties --memory 256MiB --json
    """
    recipe = recipe_of(
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
    allow_base_mismatch: ro.AllowBaseMismatch = False,
    allow_nonfinite: ro.AllowNonfinite = False,
    out: o.Out = None,
    force: o.Force = False,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    page_cache: mo.PageCache = "auto",
    device: mo.Device = "cpu",
    cache: mo.Cache = "keep",
    executor: mo.Executor = "threads",
    scheduler: mo.Scheduler = None,
    worker: mo.Worker = None,
    wait: mo.Wait = 600,
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
        with_out(read),
        force, memory, workers, dry_run, as_json, quiet, check, report, found.notes, cache,
        where_of(executor, scheduler, worker, wait, device),
    )  # fmt: skip
