"""``fit search``: values found by trial and error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro
from mergebench.cli import scoring as s

if TYPE_CHECKING:
    from mergebench.merge.fit.search import Found
    from mergebench.merge.fit.study import Attempt

#: Most trials of the table, the best ones.
_ROWS = 20


def search(
    models: o.Models,
    task: s.Tasks = None,
    base: o.Base = None,
    method: ro.MethodName = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            "-p",
            metavar="NAME[=VALUES]",
            help="What is searched, repeatable: LOW:HIGH, LOW:HIGH:log, LOW:HIGH:STEP, with :x3 "
            "for three places over depth; a,b,c; or NAME alone for all that is declared. One "
            "value fixes it. Without any, every number that method and ops declare.",
        ),
    ] = None,
    then: ro.Then = None,
    compat: ro.Compat = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, help="Trials in all.")] = 50,
    sampler: Annotated[str, typer.Option("--sampler", help="tpe or random.")] = "tpe",
    seed: Annotated[int, typer.Option("--seed", help="Of the sampler.")] = 0,
    patience: Annotated[
        int, typer.Option("--patience", min=0, help="Stop after so many trials without a better.")
    ] = 0,
    prune: Annotated[
        str,
        typer.Option(
            "--prune", help="Trials to give up after some of several tasks: hopeless, median, none."
        ),
    ] = "hopeless",
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page: history, parameters, trials.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write a picture of them.")] = None,
    study: Annotated[
        Path | None,
        typer.Option("--study", help="Journal of the trials; OUT.journal unless named."),
    ] = None,
    select: s.Select = "val",
    report_on: s.ReportOn = "test",
    out: s.RecipeOut = Path("search.yaml"),
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
    """Search values of parameters with Optuna, and write the best recipe.

    What was tried is in a journal: the same command goes on where it was interrupted.

    Examples:

    \b
      mergebench fit search ft1 ft2 --base base -m ties --task eval.py --trials 3 -o a.yaml
      mergebench fit search ft1 ft2 -b base -m ties -p lam=0.1:2:log -t eval.py -n 3 -o b.yaml
    """
    from dataclasses import replace
    from typing import get_args

    from mergebench.core.errors import ParameterError, did_you_mean
    from mergebench.merge.fit.grid import Trial
    from mergebench.merge.fit.html import write_history
    from mergebench.merge.fit.search import Prune, Settings
    from mergebench.merge.fit.search import search as run
    from mergebench.merge.fit.space import fixed_and_free, numbers_of
    from mergebench.merge.fit.study import Sampler
    from mergebench.pages import check_page, check_picture

    for name, value, known in (
        ("--sampler", sampler, get_args(Sampler)),
        ("--prune", prune, get_args(Prune)),
    ):
        if value not in known:
            raise ParameterError(f"{name}: {value!r}", fix=did_you_mean(value, known))
    recipe = s.recipe_of(models, base, method, None, then, None, None, include, exclude)
    recipe = replace(recipe, params=_ranges(param or []), compat=compat)
    recipe, dimensions = fixed_and_free(recipe)
    dimensions = dimensions or numbers_of(recipe)
    s.check_free(out, force)
    if html is not None:
        check_page(html, force)
    if png is not None:
        check_picture(png, force)
    place = out.with_suffix(".journal") if study is None else study
    scores = s.scores_of(task, base, limit, batch_size, timeout, on_error, no_cache)
    make, tell = s.maker(memory, workers), s.teller(quiet or as_json)
    settings = Settings(trials, sampler, seed, patience, prune)  # type: ignore[arg-type]
    progress = _Progress(trials, place, quiet or as_json)
    try:
        found = run(
            recipe, dimensions, scores, select, make, settings,
            file=place, tell=tell, ended=progress.ended,
        )  # fmt: skip
    except BaseException as error:
        progress.explain(error)
        raise
    with make(found.recipe, "the best") as candidate:
        final = Trial(found.best.label, found.recipe, tuple(scores.of(candidate, report_on, tell)))
        s.write(out, candidate.plan.variants[0].stored)
    write_history(found.to_json(), html, png)
    if as_json:
        console.say_json(_plain(found, out, place) | {report_on: s.plain_trial(final)})
        return
    if not quiet:
        _show(found, [each.name for each in scores.tasks], select)
        s.show_final(final.outcomes, report_on, out)


def _ranges(texts: list[str]) -> dict[str, Any]:
    """Values of ``-p``; a name alone stands for all that is declared."""
    from mergebench.cli.recipes import parse_params
    from mergebench.core.errors import ParameterError
    from mergebench.merge.fit.ranges import DECLARED

    found = parse_params([text for text in texts if "=" in text])
    for text in texts:
        if "=" not in text:
            if text in found:
                raise ParameterError(f"parameter {text!r} is given twice", fix="keep one of them")
            found[text] = DECLARED
    return found


class _Progress:
    """What is told while trials go on, and when they are cut short."""

    def __init__(self, trials: int, place: Path, quiet: bool) -> None:
        self._trials, self._place, self._quiet = trials, place, quiet
        self._done: list[Attempt] = []

    def ended(self, attempt: Attempt) -> None:
        """A line for each trial, where somebody looks on."""
        import sys

        self._done.append(attempt)
        if not self._quiet and sys.stderr.isatty():
            value = s.number(attempt.value) if attempt.state == "done" else attempt.state
            console.note(f"trial {attempt.number + 1} of {self._trials}: {attempt.label}: {value}")

    def explain(self, error: BaseException) -> None:
        """Add to an error what is kept."""
        scored = [each for each in self._done if each.value is not None]
        if self._done:
            best = max(scored, key=lambda each: each.value or 0.0) if scored else None
            best_so_far = "" if best is None else f", the best of them {best.label}"
            error.add_note(
                f"{len(self._done)} of {self._trials} trials are kept in {self._place}"
                f"{best_so_far}; the same command goes on, and with --trials {len(self._done)} "
                "it ends with what there is"
            )


def _plain(found: Found, out: Path, place: Path) -> dict[str, Any]:
    data = found.to_json()
    about = {key: data[key] for key in ("chosen", "sampler", "seed")}
    return {"recipe": str(out), "study": str(place), **about, found.select: data["trials"]}


def _show(found: Found, tasks: list[str], split: str) -> None:
    from rich.table import Table

    ranked = sorted(
        found.attempts, key=lambda each: (each.value is None, -(each.value or 0.0), each.number)
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    table.add_column(split)
    for title in (*tasks, *(["mean"] if len(tasks) > 1 else [])):
        table.add_column(title, justify="right")
    table.add_column("")
    for each in ranked[:_ROWS]:
        values = [s.number(each.tasks.get(name)) for name in tasks]
        if len(tasks) > 1:
            values.append(s.number(each.value))
        state = "best" if each is found.best else "" if each.state == "done" else each.state
        table.add_row(str(each.number + 1), each.label, *values, state)
    console.out().print(table)
    if len(ranked) > _ROWS:
        console.say(f"{len(ranked) - _ROWS} more trials are in the study")
    for each in ranked:
        if each.problem:
            console.note(f"trial {each.number + 1}, {each.label}: {each.problem}")
