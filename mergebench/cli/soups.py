"""``fit soup``: models of one base averaged, by scores or by gradients."""

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
    from mergebench.merge.fit.scores import Outcome


def soup(
    models: o.Models,
    task: s.Tasks = None,
    base: o.Base = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    kind: Annotated[
        str,
        typer.Option(
            "--kind", help="greedy, uniform, or learned (gradients: weights that add up to one)."
        ),
    ] = "greedy",
    by: Annotated[
        str, typer.Option("--by", help="Learned weights per model, or per model and tensor: layer.")
    ] = "model",
    accept: Annotated[
        str, typer.Option("--accept", help="Take a model if the soup is > or >= without it.")
    ] = ">",
    select: Annotated[
        str,
        typer.Option("--select", help="Split on which models are chosen, or weights are learned."),
    ] = "val",
    report_on: s.ReportOn = "test",
    epochs: descent.Epochs = None,
    rate: descent.Rate = None,
    seed: descent.Seed = 0,
    device: mo.Device = "cpu",
    precision: descent.Precision = "float32",
    out: s.RecipeOut = Path("soup.yaml"),
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
    """Average models: greedy as long as the score rises, uniform, or learned (arXiv:2203.05482).

    Examples:

    \b
      mergebench fit soup ft1 ft2 --task eval.py -o soup.yaml
      mergebench fit soup ft1 ft2 --task eval.py --kind learned --by layer -o b.yaml
    """
    from mergebench.core.errors import ParameterError, did_you_mean

    for option, value, choices in (
        ("--accept", accept, (">", ">=")),
        ("--kind", kind, ("greedy", "uniform", "learned")),
        ("--by", by, ("model", "layer")),
    ):
        if value not in choices:
            raise ParameterError(f"{option}: {value!r}", fix=did_you_mean(value, choices))
    filtered = bool(include or exclude)
    if kind == "learned":
        if filtered:
            raise ParameterError(
                "--kind learned: weighs all tensors", fix="leave out --include and --exclude"
            )
        from mergebench.merge.device.choose import torch_device

        asked = descent.Asked(
            models, task, base, select, None, report_on, torch_device(device), out, force, limit,
            batch_size, memory, workers, as_json, quiet,
        )  # fmt: skip
        _learned(asked, by, {"epochs": epochs, "rate": rate, "seed": seed, "precision": precision})
        return
    from mergebench.merge.fit.soups import greedy_soup, soup_of

    under = base if filtered else None
    recipe = s.recipe_of(models, under, "linear", None, None, None, None, include, exclude)
    s.check_free(out, force)
    scores = s.scores_of(task, base, limit, batch_size, timeout, on_error, no_cache)
    make, tell = s.maker(memory, workers), s.teller(quiet or as_json)
    steps: tuple[Any, ...] = ()
    if kind == "greedy":
        made = greedy_soup(recipe, scores, select, make, accept=accept, tell=tell)  # type: ignore[arg-type]
        chosen, steps = made.recipe, made.steps
    else:
        chosen = soup_of(recipe, recipe.models)
    with make(chosen, "the soup") as candidate:
        final = tuple(scores.of(candidate, report_on, tell))
        s.write(out, candidate.plan.variants[0].stored)
    if as_json:
        said = [
            {"model": s.model, "alone": s.alone, "together": s.together, "accepted": s.accepted}
            for s in steps
        ]
        data: dict[str, Any] = {"recipe": str(out)}
        if steps:
            taken = sum(step.accepted for step in steps)
            data |= {"steps": said, "value": made.value, "chosen": f"{taken} of {len(steps)}"}
            data[select] = _trials(steps)
        console.say_json(data | {report_on: [s.plain_outcome(each) for each in final]})
        return
    if quiet:
        return
    if steps:
        _show(steps, select)
    s.show_final(final, report_on, out)


def _trials(steps: Any) -> list[dict[str, Any]]:
    """What was scored to choose: every model alone, and every soup that was tried."""
    tried = [{"label": step.model, "value": step.alone} for step in steps]
    # The first soup is the best model itself.
    more = [{"label": f"with {step.model}", "value": step.together} for step in steps[1:]]
    return tried + more


def _show(steps: Any, select: str) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("model", f"alone ({select})", "soup with it", ""):
        table.add_column(title, justify="right" if "(" in title or "soup" in title else "left")
    for step in steps:
        shown = [s.number(step.alone), s.number(step.together)]
        table.add_row(step.model, *shown, "taken" if step.accepted else "left out")
    console.out().print(table)


def _learned(asked: descent.Asked, by: str, given: dict[str, Any]) -> None:
    from dataclasses import replace

    from mergebench.merge.fit.learned_soup import SETTINGS, differences, soup_of_weights
    from mergebench.merge.fit.memory import check_room
    from mergebench.merge.fit.mixture import load_mixture

    scores = descent.checked(asked)
    settings = replace(
        SETTINGS[by], **{k: value for k, value in given.items() if value is not None}
    )
    recipe = differences(s.recipe_of(asked.models, asked.base, "linear", None, None, None))
    make = s.maker(asked.memory, asked.workers)
    with make(recipe, "the models") as candidate, descent.advised(asked.device):
        check_room(candidate.plan, asked.device)
        mixture, key = load_mixture(candidate.plan), candidate.key
    # Whole models are averaged without a base, which tasks may have needed.
    adapters = any(model.checkpoint is None for model in mixture.plan.models)
    base = asked.base if adapters else None
    if not settings.shared:
        descent.check_size(mixture)

    def soup_of(weights: Any) -> Any:
        return soup_of_weights(mixture, weights, base, shared=settings.shared)

    learned = descent.run(asked, mixture, scores, settings, soup_of, make, key)
    with make(soup_of(learned.coefficients), "the soup") as candidate:
        final: tuple[Outcome, ...] = tuple(scores.of(candidate, asked.report_on))
        s.write(asked.out, candidate.plan.variants[0].stored)
    labels = [each.label for each in mixture.plan.models]
    spread = {
        label: [float(row.min()), float(row.mean()), float(row.max())]
        for label, row in zip(labels, learned.coefficients, strict=True)
    }
    if asked.as_json:
        data = descent.plain(asked, learned) | {"weights": spread}
        console.say_json(data | {asked.report_on: [s.plain_outcome(each) for each in final]})
        return
    if asked.quiet:
        return
    descent.show(learned)
    for label, (low, mean, high) in spread.items():
        shown = f"{mean:.3g}" if settings.shared else f"{low:.3g} to {high:.3g}, mean {mean:.3g}"
        console.say(f"{label}: weight {shown}")
    s.show_final(final, asked.report_on, asked.out)
