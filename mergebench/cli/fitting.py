"""``fit`` and ``compare``: what is measured with data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import options as o

if TYPE_CHECKING:
    from mergebench.merge.fit.candidate import Candidate
    from mergebench.merge.fit.compare import Comparison, Line
    from mergebench.merge.fit.grid import Trial
    from mergebench.merge.fit.scores import Outcome, Scores
    from mergebench.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Choose what to merge with data; the result is a recipe for `mergebench run`.\n\n"
    "Examples:\n\n\b\n"
    "  mergebench fit grid ft1 ft2 --base base -m ties -p lam=0.5,1 --task 'eval.py {path}'\n"
    "  mergebench fit soup ft1 ft2 ft3 --base base --task classify:data.json -o soup.yaml",
)

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


@app.command("grid")
def grid(
    models: o.Models,
    task: Tasks = None,
    base: o.Base = None,
    method: o.MethodName = None,
    param: o.Params = None,
    then: o.Then = None,
    where: o.Where = None,
    select: Select = "val",
    report_on: ReportOn = "test",
    out: RecipeOut = Path("fit.yaml"),
    force: o.Force = False,
    limit: Limit = None,
    batch_size: Batch = 32,
    timeout: Timeout = None,
    on_error: OnError = "stop",
    no_cache: NoCache = False,
    memory: o.Memory = "512MiB",
    workers: o.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Score every combination of listed parameters, and write the best recipe.

    Examples:

    \b
      mergebench fit grid ft1 ft2 --base base -p lam=0.2,0.4,0.6 -m task_arithmetic --task eval.py
      mergebench fit grid ft1 ft2 --base base -m ties -p lam=0.5,1 --task 'python eval.py {path}'
    """
    from mergebench.merge.fit.grid import Trial, best_of
    from mergebench.merge.fit.grid import grid as run

    recipe = _recipe(models, base, method, param, then, where)
    _free(out, force)
    scores = _scores(task, base, limit, batch_size, timeout, on_error, no_cache)
    make, tell = _maker(memory, workers), _teller(quiet or as_json)
    trials = run(recipe, scores, select, make, tell)
    best = best_of(trials)
    with make(best.recipe, "the best") as candidate:
        final = Trial(best.label, best.recipe, tuple(scores.of(candidate, report_on, tell)))
        _write(out, candidate.plan.variants[0].stored)
    if as_json:
        console.say_json(
            {
                "recipe": str(out),
                "chosen": best.label,
                select: [_plain(each) for each in trials],
                report_on: _plain(final),
            }
        )
        return
    if not quiet:
        _table(trials, [each.name for each in scores.tasks], select, best.label)
        _final(final.outcomes, report_on, out)


@app.command("soup")
def soup(
    models: o.Models,
    task: Tasks = None,
    base: o.Base = None,
    accept: Annotated[
        str, typer.Option("--accept", help="Take a model if the soup is > or >= without it.")
    ] = ">",
    select: Select = "val",
    report_on: ReportOn = "test",
    out: RecipeOut = Path("soup.yaml"),
    force: o.Force = False,
    limit: Limit = None,
    batch_size: Batch = 32,
    timeout: Timeout = None,
    on_error: OnError = "stop",
    no_cache: NoCache = False,
    memory: o.Memory = "512MiB",
    workers: o.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Greedy soup: average models, best first, as long as the score rises (arXiv:2203.05482).

    Examples:

    \b
      mergebench fit soup ft1 ft2 ft3 --task classify:data.json --base base
      mergebench fit soup runs/a runs/b --task 'python eval.py {path}' --accept '>='
    """
    from mergebench.core.errors import ParameterError, did_you_mean
    from mergebench.merge.fit.soups import greedy_soup

    if accept not in (">", ">="):
        raise ParameterError(f"--accept: {accept!r}", fix=did_you_mean(accept, (">", ">=")))
    recipe = _recipe(models, None, "linear", None, None, None)
    _free(out, force)
    scores = _scores(task, base, limit, batch_size, timeout, on_error, no_cache)
    make, tell = _maker(memory, workers), _teller(quiet or as_json)
    made = greedy_soup(recipe, scores, select, make, accept=accept, tell=tell)  # type: ignore[arg-type]
    with make(made.recipe, "the soup") as candidate:
        final = tuple(scores.of(candidate, report_on, tell))
        _write(out, candidate.plan.variants[0].stored)
    if as_json:
        steps = [
            {"model": s.model, "alone": s.alone, "together": s.together, "accepted": s.accepted}
            for s in made.steps
        ]
        data = {"recipe": str(out), "steps": steps, "value": made.value}
        console.say_json(data | {report_on: [_outcome(each) for each in final]})
        return
    if quiet:
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("model", f"alone ({select})", "soup with it", ""):
        table.add_column(title, justify="right" if "(" in title or "soup" in title else "left")
    for step in made.steps:
        shown = [_number(step.alone), _number(step.together)]
        table.add_row(step.model, *shown, "taken" if step.accepted else "left out")
    console.out().print(table)
    _final(final, report_on, out)


def compare(
    models: o.Models,
    task: Tasks = None,
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
    select: Select = "val",
    report_on: ReportOn = "test",
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table as Markdown too.")
    ] = None,
    force: o.Force = False,
    limit: Limit = None,
    batch_size: Batch = 32,
    timeout: Timeout = None,
    on_error: OnError = "skip",
    no_cache: NoCache = False,
    memory: o.Memory = "512MiB",
    workers: o.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare merge methods on tasks: base, each model, each method, chosen and measured apart.

    Examples:

    \b
      mergebench compare ft1 ft2 --base base --task classify:a.json --task classify:b.json
      mergebench compare ft1 ft2 --base base --task eval.py -m ties:lam=0.5/1 -m iso_c+svc
    """
    from mergebench.merge.fit.compare import compare as run
    from mergebench.merge.fit.compare import entry_of

    recipe = _recipe(models, base, "linear", None, None, None)
    chosen = method or ["linear", "task_arithmetic:lam=0.2/0.3/0.4/0.6/0.8/1", "ties:lam=0.5/1"]
    entries = [entry_of(text, recipe) for text in chosen]
    if markdown is not None:
        _free(markdown, force)
    scores = _scores(task, base, limit, batch_size, timeout, on_error, no_cache)
    found = run(
        entries, recipe, scores, select=select, report=report_on,
        make=_maker(memory, workers), tell=_teller(quiet or as_json), clock=perf_counter,
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
    values = [_number(line.values.get(task)) for task in found.tasks]
    averages = [_number(found.average(line)), _number(found.normalised(line))]
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
        "tasks": [_outcome(each) for each in line.outcomes],
        "recipe": line.recipe.to_dict(),
        **({"problem": line.problem} if line.problem else {}),
    }


def _recipe(
    models: list[str],
    base: str | None,
    method: str | None,
    param: list[str] | None,
    then: list[str] | None,
    where: list[str] | None,
) -> Recipe:
    from mergebench.cli.merging import parse_params
    from mergebench.recipe import ModelRef, Recipe, parse_op, with_rules
    from mergebench.sources import split_weight

    recipe = Recipe(
        models=tuple(ModelRef(*split_weight(each)) for each in models),
        method=method or "linear",
        params=parse_params(param or []),
        then=tuple(parse_op(each) for each in then or []),
        base=base,
    )
    return with_rules(recipe, where or ())


def _scores(
    task: list[str] | None,
    base: str | None,
    limit: int | None,
    batch: int,
    timeout: float | None,
    on_error: str,
    no_cache: bool,
) -> Scores:
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


def _maker(memory: str, workers: int | None) -> Callable[[Recipe, str], Candidate]:
    from mergebench.merge.fit.candidate import Candidate

    budget = o.size("--memory", memory)
    return lambda recipe, label: Candidate(recipe, label, memory=budget, workers=workers)


def _teller(quiet: bool) -> Callable[[str], None] | None:
    return None if quiet else lambda text: console.note(f"scoring {text}")


def _free(path: Path, force: bool) -> None:
    from mergebench.core.errors import ParameterError

    if path.exists() and not (force and path.is_file()):
        raise ParameterError(f"{path} exists", fix="give another -o, or --force to replace it")


def _write(path: Path, recipe: Recipe) -> None:
    from mergebench.checkpoints.documents import write_text

    write_text(path, replace(recipe, form="auto", out=None).to_yaml())


def _plain(trial: Trial) -> dict[str, Any]:
    return {
        "label": trial.label,
        "value": trial.value,
        "tasks": [_outcome(each) for each in trial.outcomes],
    }


def _outcome(each: Outcome) -> dict[str, Any]:
    about = {"problem": each.problem} if each.problem else {}
    return {"task": each.task, "split": each.split, "scores": each.scores,
            "seconds": round(each.seconds, 3), "kept": each.kept, **about}  # fmt: skip


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _table(trials: Sequence[Trial], tasks: Sequence[str], split: str, best: str) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(split)
    for title in (*tasks, *(["mean"] if len(tasks) > 1 else [])):
        table.add_column(title, justify="right")
    table.add_column("")
    for trial in trials:
        values = [_number(each.value) for each in trial.outcomes]
        if len(tasks) > 1:
            values.append(_number(trial.value))
        table.add_row(trial.label or "merge", *values, "best" if trial.label == best else "")
    console.out().print(table)


def _final(outcomes: Sequence[Outcome], split: str, out: Path) -> None:
    shown = ", ".join(
        f"{each.task} " + " ".join(f"{key}={value:.4g}" for key, value in each.scores.items())
        for each in outcomes
    )
    console.say(f"on {split}: {shown}")
    console.say(f"{out}: recipe; `mergebench run {out} -o merged` writes the model")
