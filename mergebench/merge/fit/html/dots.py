"""Lines of a comparison as rows of dots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from mergebench.core.text import short_labels
from mergebench.merge.fit.tables import Record, average
from mergebench.pages.drawing import GRID, INK, MOST, SERIES, plain_name

_MARKS = ("o", "s", "^", "D", "v", "P")
_LABEL = 26
#: Inches: of a row, and of all besides.
_ROW, _REST = 0.2, 0.75


def ranked(data: Record) -> list[Record]:
    """Lines with a score: base and experts as they stand, then merges, the best first."""
    scored = [line for line in data["lines"] if line["average"] is not None]
    merges = [line for line in scored if line["role"] == "merge"]
    merges.sort(key=lambda line: -line["average"])
    return [line for line in scored if line["role"] != "merge"] + merges


def names_of(lines: Sequence[Record]) -> list[str]:
    """Labels of rows: the last parts of the names of models, entries as they are written."""
    models = [str(line["model"]) for line in lines if line["role"] != "merge"]
    short = dict(zip(models, short_labels(models), strict=True))
    names = [str(line["model"]) for line in lines]
    return [plain_name(short.get(name, name), _LABEL) for name in names]


def height(lines: Sequence[Record]) -> float:
    """Inches that rows need."""
    return _ROW * len(lines) + _REST


def draw_scores(at: Any, data: Record, lines: Sequence[Record], inks: Mapping[str, str]) -> None:
    """The metric of every task, and the mean."""
    lower = set(data["lower_is_better"])
    rows = range(len(lines))
    several = len(data["tasks"]) > 1
    for place, task in enumerate(data["tasks"]):
        sign = -1.0 if task in lower else 1.0
        values = [sign * line["values"][task] for line in lines]
        ink = inks[SERIES[place]] if place < MOST else inks[INK]
        at.plot(
            values, rows, linestyle="", marker=_MARKS[min(place, MOST - 1)], color=ink,
            markersize=3.5, label=plain_name(task, _LABEL), alpha=0.9,
        )  # fmt: skip
    means = [average(data, line) for line in lines]
    if several and None not in means:
        at.plot(means, rows, linestyle="", marker="|", markersize=9, markeredgewidth=2.2,
                color=inks[INK], label="average")  # fmt: skip
    _finish(at, lines, inks, "score on " + data["report"])


def draw_shares(at: Any, lines: Sequence[Record], inks: Mapping[str, str]) -> None:
    """Means as shares of the experts' own scores."""
    for row, line in enumerate(lines):
        value = line["normalised"]
        if value is not None:
            ink = inks[SERIES[0]] if line["role"] == "merge" else inks[INK]
            at.barh(row, value, height=0.62, color=ink, linewidth=0)
    at.axvline(1.0, color=inks[INK], linewidth=0.8)
    _finish(at, lines, inks, "share of the experts' own scores")


def draw_cost(at: Any, lines: Sequence[Record], inks: Mapping[str, str]) -> None:
    """Seconds of choosing and of merging."""
    for key, ink, mark in (("merging", SERIES[1], "s"), ("choosing", SERIES[2], "o")):
        values = [max(line["cost"][key], 1e-3) for line in lines]
        shown = [(value, row) for row, value in enumerate(values) if lines[row]["cost"][key] > 0]
        if shown:
            at.plot(*zip(*shown, strict=True), linestyle="", marker=mark, color=inks[ink],
                    markersize=4, label=key)  # fmt: skip
    at.set_xscale("log")
    _finish(at, lines, inks, "seconds")


def _finish(at: Any, lines: Sequence[Record], inks: Mapping[str, str], title: str) -> None:
    at.set_yticks(range(len(lines)), names_of(lines), fontsize=7)
    at.set_ylim(len(lines) - 0.4, -0.6)
    at.set_xlabel(title, fontsize=7, color=inks[INK], labelpad=2)
    at.tick_params(labelsize=7, colors=inks[INK], width=0.5)
    at.grid(color=inks[GRID], linewidth=0.5)
    at.set_axisbelow(True)
    for spine in at.spines.values():
        spine.set(edgecolor=inks[GRID], linewidth=0.7)
    at.patch.set_visible(False)
    at.minorticks_off()


def legend(figure: Figure, at: Any, inks: Mapping[str, str]) -> None:
    """What the marks of a picture are, below it."""
    marks, labels = at.get_legend_handles_labels()
    if labels:
        figure.legend(
            marks, labels, loc="outside lower center", fontsize=7, ncols=3, frameon=False,
            labelcolor=inks[INK], handletextpad=0.2, columnspacing=1.0,
        )  # fmt: skip
