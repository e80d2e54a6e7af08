"""A comparison as tables, for terminals, Markdown and pages alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergebench.core.text import cell

Record = Mapping[str, Any]
_MEGA = 1e6


@dataclass(frozen=True)
class Table:
    """Headings and texts.

    Attributes
    ----------
    titles : tuple of str
    words : int
        How many columns, from the left, are texts; the others are numbers.
    rows : tuple of tuple of str
    """

    titles: tuple[str, ...]
    words: int
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, numbers to the right."""
        head = "| " + " | ".join(map(_escaped, self.titles)) + " |"
        rule = "|" + " --- |" * self.words + " ---: |" * (len(self.titles) - self.words)
        rows = ["| " + " | ".join(map(_escaped, row)) + " |" for row in self.rows]
        return "\n".join([head, rule, *rows]) + "\n"


def overview(data: Record) -> Table:
    """Everything at once: scores, means, and the cost in short."""
    tasks = data["tasks"]
    titles = ("model", "chosen", *tasks, "average", "normalised", "choosing s", "merging s", "MB")
    rows = []
    for line in data["lines"]:
        cost = line["cost"]
        spent = [seconds(cost["choosing"]), seconds(cost["merging"]), megabytes(cost["read"])]
        own = line["role"] == "merge" and not line.get("problem")
        rows.append((*_named(line), *_scores(data, line), *(spent if own else [""] * 3)))
    return Table(titles, 2, tuple(rows))


def scores(data: Record) -> Table:
    """The metric of each task, and means."""
    heads = [
        task if metric in ("", task) else f"{task} ({metric})"
        for task, metric in zip(data["tasks"], data["metrics"], strict=True)
    ]
    titles = ("model", "chosen", *heads, "average", "normalised")
    rows = tuple((*_named(line), *_scores(data, line)) for line in data["lines"])
    return Table(titles, 2, rows)


def shares(data: Record) -> Table:
    """Shares of each expert's own score, and their mean."""
    rows = tuple(
        (line["model"], *(number(line["shares"].get(task)) for task in data["tasks"]),
         number(line["normalised"]))
        for line in data["lines"]
    )  # fmt: skip
    return Table(("model", *data["tasks"], "mean"), 1, rows)


def costs(data: Record) -> Table:
    """Seconds and bytes."""
    titles = ("model", "trials", "choosing (s)", "merging (s)", "scoring (s)", "read (MB)",
              "written (MB)", "least memory (MB)")  # fmt: skip
    rows = []
    for line in data["lines"]:
        cost = line["cost"]
        spent = [seconds(cost[key]) for key in ("choosing", "merging", "scoring")]
        size = [megabytes(cost[key]) for key in ("read", "written", "memory")]
        rows.append((line["model"], str(line["trials"]), *spent, *size))
    return Table(titles, 1, tuple(rows))


def trials(data: Record) -> Table:
    """Of a search or a grid: values, scores and seconds of every trial."""
    names = list(data["trials"][0]["values"])
    rows = []
    for each in data["trials"]:
        values = [str(each["values"][name]) for name in names]
        tasks = [number(each["tasks"].get(task)) for task in data["tasks"]]
        mean = [number(each["value"])]
        state = "best" if each["label"] == data["chosen"] else each["state"]
        rows.append((str(each["number"] + 1), state, *values, *tasks, *mean,
                     seconds(each["seconds"])))  # fmt: skip
    titles = ("trial", "state", *names, *data["tasks"], "mean", "seconds")
    return Table(titles, 2, tuple(rows))


def _named(line: Record) -> tuple[str, str]:
    return line["model"], line["chosen"]


def _scores(data: Record, line: Record) -> list[str]:
    lower = set(data["lower_is_better"])
    values = [shown(line["values"].get(task), task in lower) for task in data["tasks"]]
    return [*values, number(average(data, line)), number(line["normalised"])]


def average(data: Record, line: Record) -> float | None:
    """The mean as it is shown; ``None`` where less is better of some tasks and not of others."""
    lower: Sequence[str] = data["lower_is_better"]
    value: float | None = line["average"]
    if value is None or not lower:
        return value
    return -value if len(lower) == len(data["tasks"]) else None


def shown(value: float | None, lower: bool) -> str:
    """A value of a task, with its own sign."""
    return number(-value if lower and value is not None else value)


def number(value: float | None) -> str:
    """A score in a table."""
    return "–" if value is None else f"{value + 0.0:.4g}"


def seconds(value: float) -> str:
    """Seconds in a table."""
    return f"{value:.1f}"


def megabytes(count: int) -> str:
    """Bytes in a table, in millions."""
    return f"{count / _MEGA:.1f}"


def _escaped(text: str) -> str:
    return cell(text).replace("|", "\\|")
