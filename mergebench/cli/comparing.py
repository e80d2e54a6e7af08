"""``compare``: methods beside each other."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import options as o
from mergebench.cli import scoring as s

if TYPE_CHECKING:
    from mergebench.merge.fit.compare import Comparison, Line


def compare(
    models: o.Models,
    task: s.Tasks = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="METHOD[:K=V/V,...][+OP...]",
            help="A line of the table, repeatable; of several values the best on --select is "
            "taken: ties:density=0.1/0.2,lam=1+lines.",
        ),
    ] = None,
    base: o.Base = None,
    select: s.Select = "val",
    report_on: s.ReportOn = "test",
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table as Markdown too.")
    ] = None,
    force: o.Force = False,
    limit: s.Limit = None,
    batch_size: s.Batch = 32,
    timeout: s.Timeout = None,
    on_error: s.OnError = "skip",
    no_cache: s.NoCache = False,
    memory: o.Memory = "512MiB",
    workers: o.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare merge methods on tasks: base, each model, each method, chosen and measured apart.

    Examples:

    \b
      mergebench compare ft1 ft2 --base base --task eval.py
      mergebench compare ft1 ft2 --base base --task eval.py -m ties:lam=0.5/1 -m iso_c+svc
    """
    from mergebench.merge.fit.compare import compare as run
    from mergebench.merge.fit.compare import entry_of

    recipe = s.recipe_of(models, base, "linear", None, None, None)
    chosen = method or ["linear", "task_arithmetic:lam=0.2/0.3/0.4/0.6/0.8/1", "ties:lam=0.5/1"]
    entries = [entry_of(text, recipe) for text in chosen]
    if markdown is not None:
        s.check_free(markdown, force)
    scores = s.scores_of(task, base, limit, batch_size, timeout, on_error, no_cache)
    found = run(
        entries, recipe, scores, select=select, report=report_on,
        make=s.maker(memory, workers), tell=s.teller(quiet or as_json), clock=perf_counter,
    )  # fmt: skip
    if markdown is not None:
        markdown.write_text(_markdown(found), encoding="utf-8")
    if as_json:
        console.say_json([_line(found, line) for line in found.lines])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, title in enumerate(_titles(found)):
        table.add_column(title, justify="left" if index < 2 else "right", overflow="fold")
    for line in found.lines:
        table.add_row(*_cells(found, line))
    console.out().print(table)
    for line in found.lines:
        for problem in [line.problem, *(each.problem for each in line.outcomes)]:
            if problem:
                console.note(f"{line.title}: {problem}")


def _titles(found: Comparison) -> list[str]:
    return ["model", "chosen", *found.tasks, "average", "normalised", "seconds"]


def _cells(found: Comparison, line: Line) -> list[str]:
    values = [s.number(line.values.get(task)) for task in found.tasks]
    averages = [s.number(found.average(line)), s.number(found.normalised(line))]
    seconds = f"{line.seconds:.1f}" if line.role == "merge" and not line.problem else ""
    return [line.title, line.chosen, *values, *averages, seconds]


def _markdown(found: Comparison) -> str:
    titles = _titles(found)
    rows = ["| " + " | ".join(titles) + " |", "| --- | --- |" + " ---: |" * (len(titles) - 2)]
    for line in found.lines:
        cells = [cell.replace("|", "\\|") for cell in map(console.cell, _cells(found, line))]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _line(found: Comparison, line: Line) -> dict[str, Any]:
    return {
        "model": line.title,
        "role": line.role,
        "chosen": line.chosen,
        "average": found.average(line),
        "normalised": found.normalised(line),
        "seconds": round(line.seconds, 3),
        "trials": line.trials,
        "tasks": [s.plain_outcome(each) for each in line.outcomes],
        "recipe": line.recipe.to_dict(),
        **({"problem": line.problem} if line.problem else {}),
    }
