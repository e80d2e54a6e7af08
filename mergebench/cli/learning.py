"""``fit atlas`` and ``fit adamerging``: coefficients learned by gradients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console, descent
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro
from mergebench.cli import scoring as s

if TYPE_CHECKING:
    from mergebench.merge.fit.learn import Settings

Objective = Annotated[
    str | None,
    typer.Option("--objective", help="labels, or without them entropy or ufm (FixMatch)."),
]


def atlas(
    models: o.Models,
    task: s.Tasks = None,
    base: o.Base = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    setting: Annotated[
        str | None,
        typer.Option(
            "--setting",
            help="What the paper trains with: addition, negation (with --forget) or few-shot by "
            "labels, or test-time without; addition or negation by default.",
            show_default=False,
        ),
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option("--forget", metavar="TASK", help="Maximise the loss of this task instead."),
    ] = None,
    objective: Objective = None,
    compat: Annotated[
        str, typer.Option("--compat", help="official: FixMatch as the authors' code does it.")
    ] = "",
    shots: Annotated[
        int | None, typer.Option("--shots", min=1, help="Examples of each class that are learned.")
    ] = None,
    parts: Annotated[
        int, typer.Option("--parts", min=1, max=1 << 16, help="K random parts of every tensor.")
    ] = 1,
    blocks: Annotated[
        int | None,
        typer.Option("--blocks", min=1, help="Hold so many vectors of each tensor, the best."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="SIZE", help="Hold the best blocks that fit: 2GiB."),
    ] = None,
    epochs: descent.Epochs = None,
    rate: descent.Rate = None,
    l1: Annotated[float, typer.Option("--l1", help="Weight of the sum of |coefficients|.")] = 0.0,
    l2: Annotated[float, typer.Option("--l2", help="Weight of the sum of their squares.")] = 0.0,
    learn_on: descent.LearnOn = "val",
    select: descent.Select = None,
    patience: descent.Patience = 0,
    report_on: s.ReportOn = "test",
    seed: descent.Seed = 0,
    device: mo.Device = "cpu",
    precision: descent.Precision = "float32",
    out: s.RecipeOut = Path("atlas.yaml"),
    force: o.Force = False,
    limit: s.Limit = None,
    batch_size: s.Batch = 128,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Learn one coefficient per model and tensor (aTLAS, arXiv:2407.02880).

    Examples:

    \b
      mergebench fit atlas ft1 ft2 --base base --task eval.py -o atlas.yaml
      mergebench fit atlas ft1 ft2 --base base --task eval.py --setting test-time -o b.yaml
    """
    from mergebench.core.errors import ParameterError
    from mergebench.merge.device.choose import torch_device
    from mergebench.merge.fit.atlas import SETTINGS

    name = setting or ("negation" if forget else "addition")
    _known("--setting", name, SETTINGS)
    _known("--compat", compat, ("", "official"))
    if name == "negation" and not forget:
        raise ParameterError("--setting negation: no task to forget", fix="--forget TASK")
    asked = descent.Asked(
        models, task, base, learn_on, select, report_on, torch_device(device), out, force, limit,
        batch_size, memory, workers, as_json, quiet, forget=forget or [], parts=parts,
        blocks=blocks, budget=None if budget is None else o.size("--budget", budget),
        include=include, exclude=exclude,
    )  # fmt: skip
    given = {"objective": objective, "compat": compat, "shots": shots, "epochs": epochs,
             "rate": rate, "l1": l1, "l2": l2, "patience": patience, "seed": seed,
             "precision": precision}  # fmt: skip
    _learn(asked, _settings(SETTINGS[name], given), "task_arithmetic", ["lam=1"])


def adamerging(
    models: o.Models,
    task: s.Tasks = None,
    base: o.Base = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    by: Annotated[
        str, typer.Option("--by", help="One coefficient per model and tensor, or per model: task.")
    ] = "tensor",
    plus: Annotated[
        bool,
        typer.Option("--plus", help="AdaMerging++: of task vectors that TIES has trimmed."),
    ] = False,
    density: Annotated[
        float, typer.Option("--density", help="Share of entries that TIES keeps, with --plus.")
    ] = 0.2,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps in all; the authors take 500.")
    ] = None,
    rate: descent.Rate = None,
    learn_on: descent.LearnOn = "val",
    select: descent.Select = None,
    patience: descent.Patience = 0,
    report_on: s.ReportOn = "test",
    seed: descent.Seed = 0,
    device: mo.Device = "cpu",
    precision: descent.Precision = "float32",
    out: s.RecipeOut = Path("adamerging.yaml"),
    force: o.Force = False,
    limit: s.Limit = None,
    batch_size: s.Batch = 16,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Learn coefficients without labels, by the entropy of predictions (arXiv:2310.02575).

    Examples:

    \b
      mergebench fit adamerging ft1 ft2 --base base --task eval.py -o learned.yaml
      mergebench fit adamerging ft1 ft2 --base base --task eval.py --plus -o b.yaml
    """
    from mergebench.merge.device.choose import torch_device
    from mergebench.merge.fit.adamerging import METHOD, PLUS, SETTINGS

    _known("--by", by, SETTINGS)
    method, params = PLUS if plus else METHOD
    asked = descent.Asked(
        models, task, base, learn_on, select, report_on, torch_device(device), out, force, limit,
        batch_size, memory, workers, as_json, quiet, include=include, exclude=exclude,
    )  # fmt: skip
    given = {"steps": steps, "rate": rate, "patience": patience, "seed": seed,
             "precision": precision}  # fmt: skip
    params = [*params, f"density={density}"] if plus else params
    _learn(asked, _settings(SETTINGS[by], given), method, params)


def _known(option: str, value: str, choices: Any) -> None:
    from mergebench.core.errors import ParameterError, did_you_mean

    if value not in choices:
        raise ParameterError(f"{option}: {value!r}", fix=did_you_mean(value, list(choices)))


def _settings(published: Settings, given: dict[str, Any]) -> Settings:
    from dataclasses import replace

    for option, choices in (
        ("objective", ("labels", "entropy", "ufm")),
        ("precision", ("float32", "bfloat16", "float16")),
    ):
        if given.get(option) is not None:
            _known(f"--{option}", given[option], choices)
    return replace(published, **{key: value for key, value in given.items() if value is not None})


def _learn(asked: descent.Asked, settings: Settings, method: str, params: list[str]) -> None:
    from mergebench.merge.fit.mixture import load_mixture

    recipe = s.recipe_of(
        asked.models, asked.base, method, params, None, None,
        include=asked.include, exclude=asked.exclude,
    )  # fmt: skip
    scores = descent.checked(asked)
    make = s.maker(asked.memory, asked.workers)
    with make(recipe, "task vectors") as candidate, descent.advised(asked.device):
        plan, key = candidate.plan, candidate.key
        keep = descent.blocks_of(asked, plan, scores, settings)
        mixture = load_mixture(plan, parts=asked.parts, seed=settings.seed, keep=keep)
    descent.check_size(mixture)
    learned = descent.run(asked, mixture, scores, settings, mixture.recipe, make, key)
    made = mixture.recipe(learned.coefficients)
    with make(made, "the result") as candidate:
        final = tuple(scores.of(candidate, asked.report_on))
        s.write(asked.out, candidate.plan.variants[0].stored, form=descent.form_of(mixture))
    spread = {
        label: [float(row.min()), float(row.mean()), float(row.max())]
        for label, row in zip(
            [each.label for each in mixture.plan.models], learned.coefficients, strict=True
        )
    }
    if asked.as_json:
        data = descent.plain(asked, learned) | {"coefficients": spread}
        console.say_json(data | {asked.report_on: [s.plain_outcome(each) for each in final]})
        return
    if asked.quiet:
        return
    descent.show(learned)
    for label, (low, mean, high) in spread.items():
        console.say(f"{label}: coefficients {low:.3g} to {high:.3g}, mean {mean:.3g}")
    s.show_final(final, asked.report_on, asked.out)
