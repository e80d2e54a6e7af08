"""``compare``: methods beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro
from mergebench.cli import scoring as s

if TYPE_CHECKING:
    from mergebench.merge.fit.tables import Table

_METHODS = ("linear", "task_arithmetic:lam=0.1:1:0.1", "ties:lam=0.2:1.4:0.2")


def compare(
    models: o.Models,
    task: s.Tasks = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="LINE",
            help="A line of the table, repeatable: METHOD[:K=V/V,...][+OP[:K=V,...]], of whose "
            "values the best on --select are taken (ties:density=0.1/0.2,lam=0.4:1.4:0.2+lines); a "
            "recipe, best.yaml; or a fit, 'fit soup', 'fit search -m ties -n 20'.",
        ),
    ] = None,
    base: o.Base = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="NAME=VALUES",
            help="Values for every line whose method has the parameter, repeatable: "
            "lam=0.1:1.5:0.1, or lines.beta=0.2/0.4 of an op.",
        ),
    ] = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    statistics: ro.Statistics = None,
    select: s.Select = "val",
    report_on: s.ReportOn = "test",
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table as Markdown too.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page: words, pictures, tables, recipes.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write the picture.")] = None,
    force: o.Force = False,
    limit: s.Limit = None,
    batch_size: s.Batch = 32,
    timeout: s.Timeout = None,
    on_error: s.OnError = "skip",
    no_cache: s.NoCache = False,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare merge methods on tasks: base, each model, each method, chosen and measured apart.

    Examples:

    \b
      mergebench compare ft1 ft2 --base base --task eval.py
      mergebench compare ft1 ft2 --base base --task eval.py -m ties:lam=0.5/1 -m iso_c+svc
    """
    from mergebench.cli.nested import Nested
    from mergebench.merge.fit import tables
    from mergebench.merge.fit.compare import compare as run
    from mergebench.merge.fit.entries import entries_of
    from mergebench.merge.fit.html import write_comparison
    from mergebench.steps import parse_assignment

    recipe = s.recipe_of(models, base, "linear", None, None, None, include=include, exclude=exclude)
    searched = dict(parse_assignment(each) for each in grid or ())
    entries = entries_of(
        method or _METHODS, recipe, searched, s.statistics_by_kind(recipe, statistics)
    )
    s.check_reports(html, png, markdown, force)
    scores = s.scores_of(task, base, limit, batch_size, timeout, on_error, no_cache)
    nested = Nested(
        models, task or [], recipe, scores,
        {
            "base": base, "select": select, "learn_on": select, "report_on": report_on,
            "limit": limit, "timeout": timeout, "on_error": on_error, "memory": memory,
            "workers": workers, "no_cache": no_cache, "include": include, "exclude": exclude,
        },
        s.maker(memory, workers), kept=not no_cache,
    )  # fmt: skip
    nested.check(entries)
    try:
        found = run(
            entries, recipe, scores, select=select, report=report_on,
            make=s.maker(memory, workers), fit=nested, tell=s.teller(quiet or as_json),
        )  # fmt: skip
    except BaseException as error:
        if not no_cache:
            error.add_note("what was scored is kept; the same command goes on")
        raise
    data = found.to_json()
    if markdown is not None:
        markdown.write_text(tables.overview(data).markdown(), encoding="utf-8")
    write_comparison(data, html, png)
    if as_json:
        console.say_json(data["lines"])
        return
    if not quiet:
        _show(tables.overview(data))
    for line in found.lines:
        for problem in line.problems:
            console.note(f"{line.title}: {problem}")


def _show(found: Table) -> None:
    from rich.table import Table as Drawn

    table = Drawn(box=None, pad_edge=False)
    for index, title in enumerate(found.titles):
        table.add_column(title, justify="left" if index < found.words else "right", overflow="fold")
    for row in found.rows:
        table.add_row(*row)
    console.out().print(table)
