"""``fit atlas`` and ``fit adamerging``: coefficients learned by gradients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import options as o
from mergebench.cli import scoring as s

if TYPE_CHECKING:
    from mergebench.merge.fit.learn import Settings

LearnOn = Annotated[str, typer.Option("--learn-on", help="Split whose batches are learned from.")]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the split.")]
Rate = Annotated[float | None, typer.Option("--rate", help="Learning rate of AdamW.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the order of batches.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1.")]


def atlas(
    models: o.Models,
    task: s.Tasks = None,
    base: o.Base = None,
    forget: Annotated[
        list[str] | None,
        typer.Option("--forget", metavar="TASK", help="Maximise the loss of this task instead."),
    ] = None,
    setting: Annotated[
        str,
        typer.Option(
            "--setting",
            help="addition or few-shot (labels), or test-time (no labels): what the paper trains "
            "with.",
        ),
    ] = "addition",
    epochs: Epochs = None,
    rate: Rate = None,
    l1: Annotated[float, typer.Option("--l1", help="Weight of the sum of |coefficients|.")] = 0.0,
    learn_on: LearnOn = "val",
    report_on: s.ReportOn = "test",
    seed: Seed = 0,
    device: Device = "cpu",
    out: s.RecipeOut = Path("atlas.yaml"),
    force: o.Force = False,
    limit: s.Limit = None,
    batch_size: s.Batch = 128,
    memory: o.Memory = "512MiB",
    workers: o.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Learn one coefficient per model and tensor (aTLAS, arXiv:2407.02880).

    Examples:

    \b
      mergebench fit atlas ft1 ft2 --base base --task eval.py -o atlas.yaml
      mergebench fit atlas ft1 ft2 --base base --task eval.py --setting test-time -o b.yaml
    """
    from mergebench.core.errors import ParameterError, did_you_mean
    from mergebench.merge.fit.atlas import SETTINGS

    if setting not in SETTINGS:
        raise ParameterError(f"--setting: {setting!r}", fix=did_you_mean(setting, SETTINGS))
    _learn(
        models, task, base, SETTINGS[setting], {"epochs": epochs, "rate": rate, "l1": l1}, forget,
        learn_on, report_on, seed, device, out, force, limit, batch_size, memory, workers, as_json,
        quiet,
    )  # fmt: skip


def adamerging(
    models: o.Models,
    task: s.Tasks = None,
    base: o.Base = None,
    by: Annotated[
        str, typer.Option("--by", help="One coefficient per model and tensor, or per model: task.")
    ] = "tensor",
    epochs: Epochs = None,
    rate: Rate = None,
    learn_on: LearnOn = "val",
    report_on: s.ReportOn = "test",
    seed: Seed = 0,
    device: Device = "cpu",
    out: s.RecipeOut = Path("adamerging.yaml"),
    force: o.Force = False,
    limit: s.Limit = None,
    batch_size: s.Batch = 16,
    memory: o.Memory = "512MiB",
    workers: o.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Learn coefficients without labels, by the entropy of predictions (arXiv:2310.02575).

    Examples:

    \b
      mergebench fit adamerging ft1 ft2 --base base --task eval.py -o learned.yaml
      mergebench fit adamerging ft1 ft2 --base base --task eval.py --by task -o b.yaml
    """
    from mergebench.core.errors import ParameterError, did_you_mean
    from mergebench.merge.fit.adamerging import SETTINGS

    if by not in SETTINGS:
        raise ParameterError(f"--by: {by!r}", fix=did_you_mean(by, SETTINGS))
    _learn(
        models, task, base, SETTINGS[by], {"epochs": epochs, "rate": rate}, None, learn_on,
        report_on, seed, device, out, force, limit, batch_size, memory, workers, as_json, quiet,
    )  # fmt: skip


def _learn(
    models: list[str],
    task: list[str] | None,
    base: str | None,
    published: Settings,
    given: dict[str, Any],
    forget: list[str] | None,
    learn_on: str,
    report_on: str,
    seed: int,
    device: str,
    out: Path,
    force: bool,
    limit: int | None,
    batch_size: int,
    memory: str,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from dataclasses import replace

    from mergebench.core.errors import ParameterError, did_you_mean
    from mergebench.merge.fit.learn import learn
    from mergebench.merge.fit.mixture import load_mixture

    recipe = s.recipe_of(models, base, "task_arithmetic", ["lam=1"], None, None)
    s.check_free(out, force)
    scores = s.scores_of(task, base, limit, batch_size, None, "stop", False)
    names = [each.name for each in scores.tasks]
    for name in forget or []:
        if name not in names:
            raise ParameterError(f"--forget: no task {name!r}", fix=did_you_mean(name, names))
    if learn_on == report_on:
        raise ParameterError(
            f"--learn-on and --report-on are both {report_on!r}",
            fix="report on a split that nothing was learned from",
        )
    settings = replace(
        published, seed=seed, **{key: value for key, value in given.items() if value is not None}
    )
    make, tell = s.maker(memory, workers), s.teller(quiet or as_json)
    with make(recipe, "task vectors") as candidate:
        mixture = load_mixture(candidate.plan)
    signs = dict.fromkeys(forget or [], -1.0)
    with console.bar(quiet or as_json, "steps") as progress:
        learned = learn(
            mixture, scores.tasks, settings, learn_on, signs=signs, tell=progress, device=device
        )
    made = mixture.recipe(learned.coefficients)
    with make(made, "the result") as candidate:
        final = tuple(scores.of(candidate, report_on, tell))
        s.write(out, candidate.plan.variants[0].stored)
    spread = {
        label: [float(row.min()), float(row.mean()), float(row.max())]
        for label, row in zip(
            [each.label for each in mixture.plan.models], learned.coefficients, strict=True
        )
    }
    if as_json:
        console.say_json(
            {
                "recipe": str(out),
                "history": list(learned.history),
                "coefficients": spread,
                report_on: [s.plain_outcome(each) for each in final],
            }
        )
        return
    if quiet:
        return
    console.say(
        f"loss {learned.history[0]:.4g} in the first epoch, {learned.history[-1]:.4g} in the last"
    )
    for label, (low, mean, high) in spread.items():
        console.say(f"{label}: coefficients {low:.3g} to {high:.3g}, mean {mean:.3g}")
    s.show_final(final, report_on, out)
