"""Recipes that are run: planned, shown or carried out, and what came out said."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer

from mergebench.cli import console, reports, trying
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli.plans import FORMS, show_plan
from mergebench.core.errors import EXIT_FINDINGS

if TYPE_CHECKING:
    from mergebench.merge.many.where import Where
    from mergebench.merge.outcome import Written
    from mergebench.merge.plan import Plan
    from mergebench.merge.readings import Row
    from mergebench.recipe import Recipe


def do(
    recipe: Recipe,
    force: bool,
    memory: str,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    check: bool = False,
    report: bool = False,
    notes: tuple[str, ...] = (),
    cache: str = "keep",
    where: Where | None = None,
) -> None:
    """Plan a recipe, and unless it is only to be shown, run it and say what came out."""
    from mergebench.merge.foreseen import foresee
    from mergebench.merge.many.where import Where
    from mergebench.merge.planning import make_plan

    started = perf_counter()
    device = "cpu" if where is None else where.device
    if not dry_run and device == "cpu":
        foresee(recipe)
    budget, stream = o.size("--memory", memory), mo.streams(cache)
    made = make_plan(recipe, memory=budget, workers=workers, stream=stream, device=device)
    made = replace(made, notes=(*notes, *made.notes)) if notes else made
    if dry_run:
        if as_json:
            console.say_json(made.to_json())
        else:
            show_plan(made)
        return
    place = where or Where()
    place.check(made, force=force)
    if check:
        trying.need_library(made)
    if not quiet:
        for text in made.notes:
            console.note(text)
    with console.bar(quiet or as_json) as progress:
        note = None if quiet else console.note
        written = place.execute(
            made, memory=budget, stream=stream, force=force, progress=progress, note=note
        )
    seconds = perf_counter() - started
    if not as_json and not quiet:
        _summary(made, written, seconds)
    if report and not as_json:
        for each in written:
            reports.show_rows(_rows(made, each))
    checked = trying.check_outputs(made, workers, quiet, as_json) if check else []
    if as_json:
        data = {"seconds": round(seconds, 3), "outputs": [_plain(made, w) for w in written]}
        console.say_json(data | ({"checks": checked} if check else {}))
    if any(each["findings"] for each in checked):
        raise typer.Exit(EXIT_FINDINGS)


def where_of(
    executor: str, scheduler: str | None, worker: str | None, wait: float, device: str
) -> Where:
    """Where a recipe is run, as the options say."""
    from mergebench.merge.many.where import Where

    return Where(executor, scheduler, worker, wait, device)


def _rows(made: Plan, written: Written) -> list[Row]:
    from mergebench.merge.readings import rows

    return rows(written.readings, made)


def _plain(made: Plan, written: Written) -> dict[str, Any]:
    ranks = {name: module.own_rank for name, module in made.package.modules.items()}
    return {
        "label": written.label,
        "path": str(written.path),
        "bytes": written.bytes,
        "residuals": dict(written.residuals),
        **({"ranks": ranks} if ranks else {}),
        "digests": dict(written.digests),
        "nonfinite": {name: dict(counts) for name, counts in written.nonfinite.items()},
        "readings": [row.to_json() for row in _rows(made, written)],
    }


#: Most modules whose residuals are shown.
_RESIDUALS = 20


def _summary(made: Plan, written: list[Written], seconds: float) -> None:
    merged, copied = len(made.aligned.items), len(made.aligned.copies)
    for each in written:
        console.say(f"{each.path}: {FORMS[made.form]}, {console.size(each.bytes)}")
        if each.residuals:
            name, worst = max(each.residuals.items(), key=lambda pair: pair[1])
            squares = [value * value for value in each.residuals.values()]
            root = (sum(squares) / len(squares)) ** 0.5
            console.say(
                f"  truncated to rank {_rank(made)}: relative residual {root:.3g} over "
                f"{len(squares)} modules, worst {worst:.3g} ({name}); --as delta loses nothing"
            )
            _show_residuals(made, each)
        for text in reports.spans(_rows(made, each)):
            console.say(f"  {text}")
    for name, counts in written[0].nonfinite.items():
        shown = ", ".join(f"{count} of {label}" for label, count in counts.items())
        console.say(f"  not finite in {name}, passed through as NaN: {shown}")
    console.say(
        f"merged {merged} tensors ({console.number(made.entries)} entries), copied {copied}, "
        f"{made.passes} pass{'es' if made.passes > 1 else ''}, {seconds:.1f} s"
    )


def _show_residuals(made: Plan, written: Written) -> None:
    """Module by module, where a rank or an energy was asked for."""
    if made.recipe.rank is None and made.recipe.energy is None:
        return
    worst = sorted(written.residuals.items(), key=lambda pair: -pair[1])
    for name, value in worst[:_RESIDUALS]:
        module = made.package.modules[name]
        console.say(f"    {name}: rank {module.own_rank} of {module.full_rank}, lost {value:.3g}")
    if len(worst) > _RESIDUALS:
        console.say(f"    {len(worst) - _RESIDUALS} more with less lost (--json lists all)")


def _rank(made: Plan) -> str:
    ranks = {module.own_rank for module in made.package.modules.values()}
    return str(max(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
