"""Scores of packed models, beside what packing has cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergebench.cli import console
from mergebench.cli import scoring as s

if TYPE_CHECKING:
    from mergebench.ship.measure import Error
    from mergebench.ship.scored import Choice


def plain_choice(choice: Choice, split: str) -> dict[str, Any]:
    """What was tried, for programs."""
    return {
        "split": split,
        "chosen": choice.best.label,
        "not_packed": [s.plain_outcome(each) for each in choice.plain],
        "trials": [
            {
                "label": each.label,
                "value": each.value,
                "bytes": each.report.bytes,
                "ratio": each.report.ratio,
                "relative_error": each.report.error.relative,
                "cosine": each.report.error.cosine,
                "tasks": [s.plain_outcome(outcome) for outcome in each.outcomes],
            }
            for each in choice.trials
        ],
    }


def show_choice(choice: Choice, split: str) -> None:
    """Scores beside what each set of parameters has cost."""
    from rich.table import Table

    from mergebench.merge.fit.scores import mean_value

    several = len(choice.plain) > 1
    table = Table(box=None, pad_edge=False)
    table.add_column(split)
    names = [each.task for each in choice.plain]
    for title in (*names, *(["mean"] if several else []), "ratio", "relative error", "cosine", ""):
        table.add_column(title, justify="right")
    rows = [("not packed", choice.plain, ("", "", "", ""))]
    for each in choice.trials:
        mark = "best" if each is choice.best else ""
        cost = (f"{each.report.ratio:.1f}", *numbers(each.report.error), mark)
        rows.append((each.label or "packed", each.outcomes, cost))
    for label, outcomes, cost in rows:
        values = [s.number(each.value) for each in outcomes]
        mean = [s.number(mean_value(outcomes))] if several else []
        table.add_row(console.cell(label), *values, *mean, *cost)
    console.out().print(table)
    console.say("")


def numbers(error: Error) -> tuple[str, str]:
    """Relative error and cosine, in a table."""
    cosine = error.cosine
    return f"{error.relative:.4f}", "" if cosine is None else f"{cosine:.4f}"
