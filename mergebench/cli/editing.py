"""``edit``: one model or task vector in, another one out."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro
from mergebench.cli.deintruding import deintrude

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Make something else of one model or task vector.\n\n"
    "Examples:\n\n\b\n"
    "  mergebench edit extract-lora ft1 --base base --rank 4 -o adapter\n"
    "  mergebench edit deintrude ft1 --base base -o mended --lam 0.7",
)


@app.callback()
def edit() -> None:
    """Make something else of one model or task vector."""


app.command("deintrude")(deintrude)


@app.command("extract-sparse")
def extract_sparse(
    model: Annotated[
        str, typer.Argument(help="What was fine-tuned, or a task vector.", show_default=False)
    ],
    base: Annotated[
        str, typer.Option("--base", "-b", help="The checkpoint it was fine-tuned from.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="A .safetensors file; a folder for --format sft."),
    ],
    density: Annotated[
        float | None, typer.Option("--density", help="Share of entries to keep, in (0, 1].")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", help="How many entries to keep instead.", min=1)
    ] = None,
    scope: Annotated[
        str, typer.Option("--scope", help="Largest entries of the model, or of each tensor.")
    ] = "model",
    whole: Annotated[
        list[str] | None,
        typer.Option(
            "--whole",
            metavar="SELECTOR",
            help="Store these tensors in full, as new values, repeatable: class=head.",
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", help="safetensors, or sft: the published pytorch_diff.bin."),
    ] = "safetensors",
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    allow_base_mismatch: ro.AllowBaseMismatch = False,
    force: o.Force = False,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Keep the entries in which a fine-tune has moved most, as a sparse difference to its base.

    The result is an adapter: any number of them compose with `merge --base`, and base+diff is the
    model. Selecting entries after training is a baseline of lottery-ticket sparse fine-tuning,
    which trains those entries once more.

    Examples:

    \b
      mergebench edit extract-sparse ft1 --base base --density 0.01 -o diff.safetensors
      mergebench edit extract-sparse ft1 --base base --count 500 --format sft -o language
    """
    from mergebench.core.errors import ParameterError
    from mergebench.merge.sparse import check_place, extract_sparse, write_sparse

    started = perf_counter()
    if density is not None and not 0 < density <= 1:
        raise ParameterError("--density", got=str(density), expected="a number in (0, 1]")
    check_place(out.expanduser(), form, force=force, inputs=(model, base))
    with console.bar(quiet or as_json) as progress:
        made = extract_sparse(
            model,
            base,
            density=density,
            count=count,
            scope=scope,
            whole=whole or (),
            include=include or (),
            exclude=exclude or (),
            allow_base_mismatch=allow_base_mismatch,
            memory=o.size("--memory", memory),
            workers=workers,
            progress=progress,
        )
    size = write_sparse(made, out.expanduser(), form, force=force)
    if as_json:
        console.say_json(
            {
                "path": str(out),
                "bytes": size,
                "entries": made.entries,
                "stored": made.stored,
                "tensors": {name: int(each[1].size) for name, each in made.diffs.items()},
                "whole": sorted(made.whole),
                "notes": list(made.notes),
                "seconds": round(perf_counter() - started, 3),
            }
        )
        return
    if quiet:
        return
    for text in made.notes:
        console.note(text)
    kept = f"{made.stored} of {made.entries} entries in {len(made.diffs)} tensors"
    more = f", {len(made.whole)} tensors in full" if made.whole else ""
    console.say(f"{out}: {kept}{more}, {console.size(size)}")


@app.command("pack-tasks")
def pack_tasks(
    models: Annotated[list[str], typer.Argument(help="Fine-tunes or adapters, with weights.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .safetensors file.")],
    base: o.Base = None,
    method: Annotated[
        str,
        typer.Option("--method", "-m", help="emr or tall_masks, or one before --then tall_mask."),
    ] = "emr",
    param: ro.Params = None,
    then: ro.Then = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    allow_base_mismatch: ro.AllowBaseMismatch = False,
    force: o.Force = False,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Store what a method gives every task in one file: a vector for all, a mask for each.

    FILE#TASK is then the task vector of one of them, wherever a model or adapter may stand. With
    N tasks a file takes 32 + N bits for an entry, where N task vectors take 32 N.

    Examples:

    \b
      mergebench edit pack-tasks ft1 ft2 --base base -o tasks.safetensors
      mergebench edit pack-tasks ft1 ft2 --base base -m tall_masks -o masks.safetensors
    """
    from mergebench.merge.masks import pack_tasks as pack
    from mergebench.recipe import ModelRef, Recipe
    from mergebench.sources.references import split_weight
    from mergebench.steps import parse_assignment, parse_op

    started = perf_counter()
    recipe = Recipe(
        models=tuple(ModelRef(*split_weight(each)) for each in models),
        base=base,
        method=method,
        params=dict(parse_assignment(text) for text in param or ()),
        then=tuple(parse_op(each) for each in then or ()),
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        allow_base_mismatch=allow_base_mismatch,
    )
    with console.bar(quiet or as_json) as progress:
        made = pack(
            recipe,
            out.expanduser(),
            force=force,
            memory=o.size("--memory", memory),
            workers=workers,
            progress=progress,
        )
    if as_json:
        console.say_json(
            {
                "path": str(out),
                "bytes": made.bytes,
                "entries": made.entries,
                "tasks": {
                    task: {"scale": scale, "kept": share}
                    for task, scale, share in zip(made.tasks, made.scales, made.shares, strict=True)
                },
                "notes": list(made.notes),
                "seconds": round(perf_counter() - started, 3),
            }
        )
        return
    if quiet:
        return
    for text in made.notes:
        console.note(text)
    for task, scale, share in zip(made.tasks, made.scales, made.shares, strict=True):
        console.say(f"{out}#{task}: {share:.1%} of the entries, times {scale:.6g}")
    console.say(f"{out}: {len(made.tasks)} tasks, {console.size(made.bytes)}")


@app.command("extract-lora")
def extract_lora(
    model: Annotated[str, typer.Argument(help="What was fine-tuned.", show_default=False)],
    base: Annotated[
        str, typer.Option("--base", "-b", help="The checkpoint it was fine-tuned from.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder, or a .safetensors file.")],
    rank: ro.Rank = None,
    energy: ro.Energy = None,
    embeddings: Annotated[
        str,
        typer.Option(
            "--embeddings",
            help="Embeddings and head: whole, their new values (modules_to_save); lora, factors; "
            "base, left as in the base.",
        ),
    ] = "whole",
    whole: ro.Whole = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    dtype: ro.Dtype = "keep",
    target: ro.Target = None,
    allow_base_mismatch: ro.AllowBaseMismatch = False,
    force: o.Force = False,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write what a fine-tune has moved as a LoRA: layer by layer the best of its rank.

    Norms and biases that moved are written in full; what did not move is left out. The share of
    each update that is lost is printed.

    Examples:

    \b
      mergebench edit extract-lora ft1 --base base --rank 4 -o adapter
      mergebench edit extract-lora ft1 --base base --energy 0.9 --embeddings lora -o adapter
    """
    from mergebench.cli.executing import do
    from mergebench.merge.extract_lora import extraction

    recipe = extraction(
        model,
        base,
        rank=rank,
        energy=energy,
        embeddings=embeddings,
        whole=whole or (),
        include=include or (),
        exclude=exclude or (),
        dtype=dtype,
        target=target,
        allow_base_mismatch=allow_base_mismatch,
        out=str(out),
    )
    do(recipe, force, memory, workers, dry_run, as_json, quiet)
