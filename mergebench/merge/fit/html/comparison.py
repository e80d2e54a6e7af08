"""The page and the picture of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from mergebench.merge.fit import tables
from mergebench.merge.fit.html import dots
from mergebench.merge.fit.tables import Record, number
from mergebench.pages.colours import LEVELS, level
from mergebench.pages.drawing import PAPER, SCREEN, plain_style, png
from mergebench.pages.shell import render
from mergebench.pages.svg import inline_svg

_WIDE = 3.6


def comparison_page(data: Record) -> str:
    """The whole page.

    Parameters
    ----------
    data : mapping
        As :meth:`mergebench.merge.fit.compare.Comparison.to_json` gives it.

    Returns
    -------
    str
        As of :func:`mergebench.pages.shell.render`.
    """
    merges = [line for line in data["lines"] if line["role"] == "merge"]
    tasks = data["tasks"]
    values = {
        "data": data,
        "title": f"Comparison of {_count(len(merges), 'merge')} on {_count(len(tasks), 'task')}",
        "lead": f"Parameters were chosen on {data['select']}; everything here was measured on "
        f"{data['report']}.",
        "said": list(sentences(data)),
        "problems": [(line["model"], text) for line in data["lines"] for text in _problems(line)],
        "figures": list(_figures(data)),
        "scores": tables.scores(data),
        "shares": tables.shares(data),
        "classes": _classes(data),
        "levels": LEVELS,
        "newline": Markup("\n"),
        "span": _span(data),
        "costs": tables.costs(data),
        "made": [
            {
                "line": line,
                "recipe": _recipe(line["recipe"]),
                "tried": [(each["label"], number(each["value"])) for each in line["selection"]],
            }
            for line in merges
        ],
    }
    return render("mergebench.merge.fit.html", "comparison.html", values)


def comparison_picture(data: Record, resolution: int) -> bytes:
    """Scores, shares and seconds beside each other, for papers."""
    with plain_style():
        lines = dots.ranked(data)
        figure = Figure(figsize=(7.4, dots.height(lines) + 0.25), layout="constrained")
        parts = figure.subplots(1, 3, sharey=True, width_ratios=(1.5, 1, 0.8))
        dots.draw_scores(parts[0], data, lines, PAPER)
        dots.draw_shares(parts[1], lines, PAPER)
        dots.draw_cost(parts[2], lines, PAPER)
        handles: list[Any] = []
        labels: list[str] = []
        for at in (parts[0], parts[2]):
            marks, names = at.get_legend_handles_labels()
            handles, labels = handles + marks, labels + names
        if labels:
            figure.legend(handles, labels, loc="outside lower center", fontsize=7, ncols=6,
                          frameon=False)  # fmt: skip
        return png(figure, resolution)


def sentences(data: Record) -> Sequence[str]:
    """What one would say of it."""
    lines = dots.ranked(data)
    merges = [line for line in lines if line["role"] == "merge"]
    said = []
    if merges:
        best = merges[0]
        chosen = f" ({best['chosen']})" if best["chosen"] else ""
        words = f"{best['model']}{chosen} is the best merge: {_averages(data, best)}."
        if len(merges) > 1:
            words += f" {merges[1]['model']} is next: {_averages(data, merges[1])}."
        said.append(words)
    experts = {line["model"]: line for line in data["lines"] if line["role"] == "expert"}
    lower = set(data["lower_is_better"])
    own = [
        f"{task} {tables.shown(experts[title]['values'].get(task), task in lower)} by {title}"
        for task, title in data["experts"].items()
    ]
    if own:
        said.append(f"Experts on their own tasks: {'; '.join(own)}. Normalised values are shares "
                    "of these.")  # fmt: skip
    base = next((line for line in lines if line["role"] == "base"), None)
    if base is not None and merges:
        worse = [line["model"] for line in merges if line["average"] < base["average"]]
        text = f"The base alone: {_averages(data, base)}."
        said.append(text + (f" Below it: {', '.join(worse)}." if worse else ""))
    for task in data["tasks"] if len(data["tasks"]) > 1 and merges else ():
        top = max(merges, key=lambda line: line["values"][task])
        value = tables.shown(top["values"][task], task in lower)
        said.append(f"{task}: best merged by {top['model']}, {value}.")
    return said


def _averages(data: Record, line: Record) -> str:
    value = tables.average(data, line)
    parts = [] if value is None else [f"average {number(value)}"]
    if line["normalised"] is not None:
        parts.append(f"normalised {number(line['normalised'])}")
    return ", ".join(parts) or "no average"


def _problems(line: Record) -> list[str]:
    found = [line["problem"]] if line.get("problem") else []
    return found + [f"{o['task']}: {o['problem']}" for o in line["tasks"] if o.get("problem")]


def _figures(data: Record) -> Sequence[Mapping[str, Any]]:
    lines = dots.ranked(data)
    if not lines:
        return []
    best = [f"{name} {number(tables.average(data, line) or line['average'])}"
            for name, line in zip(dots.names_of(lines), lines, strict=True)]  # fmt: skip
    shares = [f"{name} {number(line['normalised'])}"
              for name, line in zip(dots.names_of(lines), lines, strict=True)]  # fmt: skip
    drawn = [("Scores", "Averages by row: " + "; ".join(best))]
    if any(line["normalised"] is not None for line in lines):
        drawn.append(("Normalised", "Means of shares by row: " + "; ".join(shares)))
    spent = [f"{name} {line['cost']['choosing']:.1f} and {line['cost']['merging']:.1f}"
             for name, line in zip(dots.names_of(lines), lines, strict=True)]  # fmt: skip
    if any(line["cost"]["choosing"] + line["cost"]["merging"] > 0 for line in lines):
        drawn.append(("Cost", "Seconds of choosing and of merging by row: " + "; ".join(spent)))
    found = []
    with plain_style():
        for place, (title, words) in enumerate(drawn):
            figure = Figure(figsize=(_WIDE, dots.height(lines)), layout="constrained")
            at = figure.subplots()
            if title == "Scores":
                dots.draw_scores(at, data, lines, SCREEN)
            elif title == "Normalised":
                dots.draw_shares(at, lines, SCREEN)
            else:
                dots.draw_cost(at, lines, SCREEN)
            dots.legend(figure, at, SCREEN)
            svg = Markup(inline_svg(figure, f"f{place}", title, words))  # noqa: S704
            found.append({"title": title, "svg": svg})
    return found


def _span(data: Record) -> tuple[float, float] | None:
    values = [value for line in data["lines"] for value in line["shares"].values()]
    return (min(values), max(values)) if values else None


def _classes(data: Record) -> list[list[str]]:
    """The colour of each cell of the table of shares."""
    span = _span(data)
    found = []
    for line in data["lines"]:
        values = [*(line["shares"].get(task) for task in data["tasks"]), line["normalised"]]
        found.append(
            ["" if each is None or span is None else f"v{level(each, *span)}" for each in values]
        )
    return found


def _recipe(data: Mapping[str, Any]) -> list[str]:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).splitlines()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
