"""``fit graft``: the entries of a fine-tune that carry a task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro
from mergebench.cli import scoring as s

if TYPE_CHECKING:
    from mergebench.merge.fit.graft import Grafted


def graft(
    model: Annotated[
        str, typer.Argument(help="What was fine-tuned, or a task vector.", show_default=False)
    ],
    task: s.Tasks = None,
    base: o.Base = None,
    density: Annotated[
        float, typer.Option("--density", help="Share of entries that the mask starts with.")
    ] = 1e-4,
    epochs: Annotated[int, typer.Option("--epochs", min=0, help="Passes over the split.")] = 10,
    rate: Annotated[
        float, typer.Option("--rate", min=0, help="Learning rate of gradient descent.")
    ] = 1e7,
    l1: Annotated[
        float, typer.Option("--l1", min=0, help="Weight of the number of entries in the loss.")
    ] = 0.0,
    include: ro.Include = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="SELECTOR",
            help="Leave these tensors as in the base; class=embedding and class=head by default.",
        ),
    ] = None,
    learn_on: Annotated[
        str, typer.Option("--learn-on", help="Split whose batches are learned from.")
    ] = "val",
    report_on: s.ReportOn = "test",
    seed: Annotated[int, typer.Option("--seed", help="Of the start and the order of batches.")] = 0,
    device: mo.Device = "cpu",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The sparse difference, a .safetensors file.")
    ] = Path("graft.safetensors"),
    force: o.Force = False,
    limit: s.Limit = None,
    batch_size: s.Batch = 32,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Learn which few entries of a fine-tune carry a task (skill grafting, arXiv:2302.06600).

    The result is a task vector that `merge --base` takes like any other.

    Examples:

    \b
      mergebench fit graft ft1 --base base --task eval.py -o graft.safetensors
      mergebench fit graft ft1 --base base --task eval.py --density 0.1 --epochs 2 -o c.safetensors
    """
    from mergebench.core.errors import ParameterError
    from mergebench.merge.device.choose import torch_device
    from mergebench.merge.fit.graft import Settings, fixed
    from mergebench.merge.fit.graft import graft as run
    from mergebench.merge.sparse import check_place, write_sparse

    if not 0 < density <= 1:
        raise ParameterError("--density", got=str(density), expected="a number in (0, 1]")
    if learn_on == report_on:
        raise ParameterError(
            f"--learn-on and --report-on are both {report_on!r}",
            fix="report on a split that nothing was learned from",
        )
    device = torch_device(device)
    given = [model, *([] if base is None else [base])]
    check_place(out.expanduser(), "safetensors", force=force, inputs=given)
    scores = s.scores_of(task, base, limit, batch_size, None, "stop", False)
    make, tell = s.maker(memory, workers), s.teller(quiet or as_json)
    whole = s.recipe_of([model], base, "task_arithmetic", ["lam=1"], None, None)
    recipe = replace(
        whole,
        include=tuple(include or ()),
        exclude=fixed(whole, make) if exclude is None else tuple(exclude),
    )
    settings = Settings(density, epochs, rate, l1, seed)
    with console.bar(quiet or as_json, "steps") as progress:
        made = run(
            recipe, scores.tasks, settings, learn_on, make=make, tell=progress, device=device
        )
    size = write_sparse(made.sparse, out.expanduser(), "safetensors", force=force)
    merged = s.recipe_of([str(out)], base, "task_arithmetic", ["lam=1"], None, None)
    with make(merged, "the graft") as candidate:
        final = tuple(scores.of(candidate, report_on, tell))
    if as_json:
        console.say_json(
            {
                "path": str(out),
                "bytes": size,
                "entries": made.sparse.entries,
                "stored": made.sparse.stored,
                "history": [{"loss": loss, "entries": count} for loss, count in made.history],
                "best": made.best,
                "overlap": made.overlap,
                report_on: [s.plain_outcome(each) for each in final],
            }
        )
        return
    if not quiet:
        _show(made, out, size)
        shown = ", ".join(
            f"{each.task} " + " ".join(f"{key}={value:.4g}" for key, value in each.scores.items())
            for each in final
        )
        console.say(f"on {report_on}: {shown}")


def _show(made: Grafted, out: Path, size: int) -> None:
    (first, many), (last, few) = made.history[0], made.history[made.best]
    console.say(
        f"loss {first:.4g} with the {many:,} entries that moved most, {last:.4g} with the {few:,} "
        f"of epoch {made.best}, which share {made.overlap:.0%} of the smaller set"
    )
    share = made.sparse.stored / max(made.sparse.entries, 1)
    console.say(
        f"{out}: task vector with {made.sparse.stored:,} of {made.sparse.entries:,} entries "
        f"({share:.2g}), {console.size(size)}; `mergebench merge {out} -b BASE -m task_arithmetic`"
    )
