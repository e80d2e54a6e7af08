"""Options and output that commands share which score models with tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import options as o

if TYPE_CHECKING:
    from mergebench.merge.fit.candidate import Candidate
    from mergebench.merge.fit.grid import Trial
    from mergebench.merge.fit.scores import Outcome, Scores
    from mergebench.recipe import ModelRef, Recipe

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "-t",
        metavar="[NAME=]SPEC",
        help="What scores a model, repeatable: a command with {path} that prints JSON, "
        "classify:FILE.json, perplexity:FILE.txt, lm_eval:TASK,…, FILE.py[:factory] or "
        "module:factory.",
        show_default=False,
    ),
]
Select = Annotated[str, typer.Option("--select", help="Split on which values are chosen.")]
ReportOn = Annotated[str, typer.Option("--report-on", help="Split on which results are measured.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Most examples of a split.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Examples at a time.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", help="Seconds that scoring one model may take.")
]
OnError = Annotated[
    str, typer.Option("--on-error", help="Where a scorer fails: stop, or skip and go on.")
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Measure again what was measured before.")
]
RecipeOut = Annotated[
    Path, typer.Option("--out", "-o", help="The recipe that is written, for `mergebench run`.")
]


def recipe_of(
    models: list[str],
    base: str | None,
    method: str | None,
    param: list[str] | None,
    then: list[str] | None,
    where: list[str] | None,
    statistics: list[str] | None = None,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
) -> Recipe:
    """The recipe that options describe."""
    from mergebench.cli.recipes import parse_params, with_statistics
    from mergebench.recipe import ModelRef, Recipe, with_rules
    from mergebench.sources.references import split_weight
    from mergebench.steps import parse_op

    recipe = Recipe(
        models=with_statistics(
            tuple(ModelRef(*split_weight(each)) for each in models), statistics or ()
        ),
        method=method or "linear",
        params=parse_params(param or []),
        then=tuple(parse_op(each) for each in then or []),
        base=base,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
    )
    return with_rules(recipe, where or ())


def statistics_by_kind(
    recipe: Recipe, given: Sequence[str] | None
) -> dict[str, tuple[ModelRef, ...]]:
    """The models with their statistics, once for every kind that there are files of."""
    from mergebench.cli.recipes import with_statistics
    from mergebench.merge.collected import open_collected

    paths = [each.path for each in recipe.models]
    groups: dict[str, list[str]] = {}
    for text in given or ():
        name, equals, file = text.partition("=")
        named = equals and (name in paths or name in {Path(path).name for path in paths})
        groups.setdefault(open_collected(file if named else text).kind, []).append(text)
    return {kind: with_statistics(recipe.models, files) for kind, files in groups.items()}


def scores_of(
    task: list[str] | None,
    base: str | None,
    limit: int | None,
    batch: int,
    timeout: float | None,
    on_error: str,
    no_cache: bool,
) -> Scores:
    """Scores of the tasks that options name."""
    from mergebench.core.errors import ParameterError, did_you_mean
    from mergebench.merge.fit.find import Setting, parse_task
    from mergebench.merge.fit.scores import Scores, default_file

    if on_error not in ("stop", "skip"):
        raise ParameterError(
            f"--on-error: {on_error!r}", fix=did_you_mean(on_error, ("stop", "skip"))
        )
    setting = Setting(None if base is None else Path(base).expanduser(), limit, batch, timeout)
    return Scores(
        [parse_task(each, setting) for each in task or []],
        kept=None if no_cache else default_file(),
        timeout=timeout,
        on_error=on_error,
    )


def maker(memory: str, workers: int | None) -> Callable[[Recipe, str], Candidate]:
    """What makes candidates of recipes."""
    from mergebench.merge.fit.candidate import Candidate
    from mergebench.merge.shared import Shared

    budget, shared = o.size("--memory", memory), Shared()
    return lambda recipe, label: Candidate(
        recipe, label, memory=budget, workers=workers, shared=shared
    )


def teller(quiet: bool) -> Callable[[str], None] | None:
    """What is told of every model that is scored."""
    shown = not quiet and sys.stderr.isatty()
    return (lambda text: console.note(f"scoring {text}")) if shown else None


def check_free(path: Path, force: bool) -> None:
    """Refuse to replace a file, unless it is asked for."""
    from mergebench.core.errors import ParameterError

    if path.exists() and not (force and path.is_file()):
        raise ParameterError(f"{path} exists", fix="give another -o, or --force to replace it")


def check_reports(html: Path | None, png: Path | None, markdown: Path | None, force: bool) -> None:
    """Refuse a page, a picture or a table that could not be written, before anything is scored."""
    from mergebench.pages import check_page, check_picture

    if markdown is not None:
        check_free(markdown, force)
    if html is not None:
        check_page(html, force)
    if png is not None:
        check_picture(png, force)


def write(path: Path, recipe: Recipe, form: str = "auto") -> None:
    """Write a recipe that `run` reads."""
    from mergebench.checkpoints.documents import write_text

    write_text(path, replace(recipe, form=form, out=None).to_yaml())


def plain_trial(trial: Trial) -> dict[str, Any]:
    """A trial for programs."""
    return {
        "label": trial.label,
        "value": trial.value,
        "tasks": [plain_outcome(each) for each in trial.outcomes],
    }


def plain_outcome(each: Outcome) -> dict[str, Any]:
    """An outcome for programs."""
    return each.to_json()


def number(value: float | None) -> str:
    """A value in a table."""
    return "–" if value is None else f"{value + 0.0:.4g}"


def show_trials(trials: Sequence[Trial], tasks: Sequence[str], split: str, best: str) -> None:
    """A table of trials."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(split)
    for title in (*tasks, *(["mean"] if len(tasks) > 1 else [])):
        table.add_column(title, justify="right")
    table.add_column("")
    for trial in trials:
        values = [number(each.value) for each in trial.outcomes]
        if len(tasks) > 1:
            values.append(number(trial.value))
        table.add_row(trial.label or "merge", *values, "best" if trial.label == best else "")
    console.out().print(table)


def show_final(outcomes: Sequence[Outcome], split: str, out: Path) -> None:
    """What the result scores, and where it is."""
    shown = ", ".join(
        f"{each.task} " + " ".join(f"{key}={value:.4g}" for key, value in each.scores.items())
        for each in outcomes
    )
    console.say(f"on {split}: {shown}")
    console.say(f"{out}: recipe; `mergebench run {out} -o merged` writes the model")
