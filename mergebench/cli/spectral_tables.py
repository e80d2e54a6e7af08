"""Spectral reports on a terminal: sentences first, then tables with sparklines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from mergebench.cli import console
from mergebench.core.text import written

_LEVELS = "▁▂▃▄▅▆▇█"
#: Most types of modules and most changes that are printed; --json and --csv have all.
_ROWS, _CHANGES = 24, 20
_WIDEST = 48
#: Most sentences of one diagnostic.
_SENTENCES = 6


def show(data: Mapping[str, Any]) -> None:
    """Print a report, as ``Report.to_json`` gives it."""
    for text in data["notes"]:
        console.note(text)
    for found in data["diagnostics"].values():
        for text in found["sentences"][:_SENTENCES]:
            console.say(text)
        if (more := len(found["sentences"]) - _SENTENCES) > 0:
            console.say(f"({more} more like these)")
    labels = console.short_labels([each["label"] for each in data["models"]])
    labels = [
        f"{label} (merge)" if each["merged"] else label
        for label, each in zip(labels, data["models"], strict=True)
    ]
    for name, found in data["diagnostics"].items():
        if found["rows"]:
            console.say("")
            console.say(f"{name}: {found['about']}")
            _show_found(name, found, labels)
    if "against" in data:
        _show_changes(data["against"], labels)


def sparkline(values: Sequence[float | None]) -> str:
    """Bars from 0 to the largest value, a dot for what is not defined; thinned out if too many."""
    if len(values) > _WIDEST:
        values = [values[i * len(values) // _WIDEST] for i in range(_WIDEST)]
    top = max((abs(v) for v in values if v is not None and isfinite(v)), default=0.0)
    return "".join(
        "·"
        if v is None or not isfinite(v)
        else _LEVELS[min(round(abs(v) / top * 7), 7) if top > 0 else 0]
        for v in values
    )


def _show_found(name: str, found: Mapping[str, Any], labels: Sequence[str]) -> None:
    from mergebench.spectral.diagnostic import DIAGNOSTICS

    spec = DIAGNOSTICS[name]
    totals = found["totals"]
    paired = any(each["other"] is not None for each in totals["all"])
    if paired:
        _show_pairs(spec, totals, labels)
        return
    from rich.table import Table

    first = spec.headline(totals["all"][0])
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    table.add_column("module", overflow="fold")
    for heading in first:
        table.add_column(heading, justify="right", overflow="fold")
    lead = next(iter(first))
    table.add_column(f"{lead} by layer")
    for whole in totals["all"]:
        model = whole["model"]
        label = "together" if model is None else console.cell(labels[model])
        modules = [each for each in totals["modules"] if each["model"] == model]
        if len(modules) > 1:
            for each in modules[:_ROWS]:
                numbers = [written(v) for v in spec.headline(each).values()]
                line = _by_layer(spec, found["rows"], model, each["where"], lead)
                table.add_row(label, console.cell(each["where"]), *numbers, line)
        if len(modules) > _ROWS:
            table.add_row(label, f"({len(modules) - _ROWS} more)")
        layers = [each for each in totals["layers"] if each["model"] == model]
        line = sparkline([spec.headline(each)[lead] for each in layers])
        table.add_row(label, "all", *(written(v) for v in spec.headline(whole).values()), line)
    console.out().print(table)


def _by_layer(
    spec: Any, rows: Sequence[Mapping[str, Any]], model: int | None, module: str, lead: str
) -> str:
    own = [row for row in rows if row["model"] == model and row["module"] == module]
    return sparkline([spec.headline(row)[lead] for row in own])


def _show_pairs(spec: Any, totals: Mapping[str, Any], labels: Sequence[str]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("models", overflow="fold")
    first = spec.headline(totals["all"][0])
    for heading in first:
        table.add_column(heading, justify="right", overflow="fold")
    lead = next(iter(first))
    table.add_column(f"{lead} by layer")
    for whole in totals["all"]:
        one, other = whole["model"], whole["other"]
        layers = [e for e in totals["layers"] if (e["model"], e["other"]) == (one, other)]
        table.add_row(
            console.cell(f"{labels[one]} – {labels[other]}"),
            *(written(v) for v in spec.headline(whole).values()),
            sparkline([spec.headline(each)[lead] for each in layers]),
        )
    console.out().print(table)
    if len(labels) > 2:
        _show_matrix(spec, totals["all"], labels, lead)


def _show_matrix(
    spec: Any, pairs: Sequence[Mapping[str, Any]], labels: Sequence[str], lead: str
) -> None:
    """The leading number of every pair as a matrix."""
    from rich.table import Table

    held = {(each["model"], each["other"]): spec.headline(each)[lead] for each in pairs}
    table = Table(box=None, pad_edge=False)
    table.add_column(lead)
    for label in labels:
        table.add_column(console.cell(label), justify="right", overflow="fold")
    for row, label in enumerate(labels):
        cells = [
            "" if row == column else written(held.get((min(row, column), max(row, column))))
            for column in range(len(labels))
        ]
        table.add_row(console.cell(label), *cells)
    console.out().print(table)


def _show_changes(against: Mapping[str, Any], labels: Sequence[str]) -> None:
    from rich.table import Table

    console.say("")
    for text in against["notes"]:
        console.note(text)
    changes = against["changes"]
    whole = [each for each in changes if each["scope"] == "all"]
    if not whole:
        console.say(f"against {against['path']}: no total differs")
        return
    console.say(f"against {against['path']}: {len(whole)} totals differ")
    table = Table(box=None, pad_edge=False)
    for heading in ("diagnostic", "model", "where", "quantity", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading != "change" else "right")
    rows = sorted(
        (each for each in changes if each["scope"] == "rows"),
        key=lambda each: -_relative(each),
    )
    for each in [*whole, *rows[:_CHANGES]]:
        table.add_row(
            each["diagnostic"],
            console.cell(_label(each, labels)),
            console.cell(each["where"]),
            each["quantity"],
            written(each["before"]),
            written(each["after"]),
            f"{each['after'] - each['before']:+.4g}",
        )
    console.out().print(table)
    if len(rows) > _CHANGES:
        console.say(f"{len(rows) - _CHANGES} more numbers of single tensors differ (--json)")


def _relative(change: Mapping[str, Any]) -> float:
    size = max(abs(change["before"]), abs(change["after"]))
    return abs(change["after"] - change["before"]) / size if size else 0.0


def _label(record: Mapping[str, Any], labels: Sequence[str]) -> str:
    if record["model"] is None:
        return "together"
    one = labels[record["model"]]
    return one if record["other"] is None else f"{one} – {labels[record['other']]}"
