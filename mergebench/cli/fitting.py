"""``fit``: choices made with data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro
from mergebench.cli import scoring as s

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Choose what to merge with data; the result is a recipe for `mergebench run`.\n\n"
    "Examples:\n\n\b\n"
    "  mergebench fit grid ft1 ft2 --base base -m ties -p lam=0.5,1 --task eval.py\n"
    "  mergebench fit soup ft1 ft2 --task 'python score.py {path}' -o soup.yaml",
)


@app.command("grid")
def grid(
    models: o.Models,
    task: s.Tasks = None,
    base: o.Base = None,
    method: ro.MethodName = None,
    param: ro.Params = None,
    then: ro.Then = None,
    where: ro.Where = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    statistics: ro.Statistics = None,
    select: s.Select = "val",
    report_on: s.ReportOn = "test",
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page: parameters, trials, the recipe.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write a picture of them.")] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table as Markdown too.")
    ] = None,
    out: s.RecipeOut = Path("fit.yaml"),
    force: o.Force = False,
    limit: s.Limit = None,
    batch_size: s.Batch = 32,
    timeout: s.Timeout = None,
    on_error: s.OnError = "stop",
    no_cache: s.NoCache = False,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Score every combination of listed parameters, and write the best recipe.

    Examples:

    \b
      mergebench fit grid ft1 ft2 --base base -m lines -p beta=0.2,0.4 --task eval.py -o a.yaml
      mergebench fit grid ft1 ft2 -b base -m ties -p lam=0.5,1 -t 'python score.py {path}' -o b.yaml
    """
    from mergebench.checkpoints.documents import write_text
    from mergebench.merge.fit import tables
    from mergebench.merge.fit.grid import Trial, best_of, record
    from mergebench.merge.fit.grid import grid as run
    from mergebench.merge.fit.html import write_history

    recipe = s.recipe_of(models, base, method, param, then, where, statistics, include, exclude)
    s.check_free(out, force)
    s.check_reports(html, png, markdown, force)
    scores = s.scores_of(task, base, limit, batch_size, timeout, on_error, no_cache)
    make, tell = s.maker(memory, workers), s.teller(quiet or as_json)
    trials = run(recipe, scores, select, make, tell)
    best = best_of(trials)
    with make(best.recipe, "the best") as candidate:
        final = Trial(best.label, best.recipe, tuple(scores.of(candidate, report_on, tell)))
        s.write(out, candidate.plan.variants[0].stored)
    data = record(trials, best, [each.name for each in scores.tasks], select)
    if markdown is not None:
        write_text(markdown, tables.trials(data).markdown())
    write_history(data, html, png)
    if as_json:
        console.say_json(
            {
                "recipe": str(out),
                "chosen": best.label,
                select: [s.plain_trial(each) for each in trials],
                report_on: s.plain_trial(final),
            }
        )
        return
    if not quiet:
        s.show_trials(trials, [each.name for each in scores.tasks], select, best.label)
        s.show_final(final.outcomes, report_on, out)
