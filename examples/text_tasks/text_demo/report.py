"""The rows as a table on the terminal and as Markdown, and what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .merges import TEXTS, Row

_TITLES = {"full": "Full fine-tunes", "lora": "LoRAs"}
_UNLIMITED = 1000
CAPTION = (
    "Accuracy on the test split in %. Values of parameters are chosen on the validation split by "
    "its labels; *needs* says what else of it a merge was made with. Normalised: mean over tasks "
    "of accuracy / accuracy of that task's own expert."
)


def header(tasks: Sequence[str]) -> list[str]:
    """Column titles."""
    return ["model", "needs", "chosen", *tasks, "average", "normalised", "seconds"]


def cells(row: Row, own: Mapping[str, float]) -> list[str]:
    """One line of text per column."""
    shown = [f"{100 * row.values[task]:.1f}" if row.values else "–" for task in own]
    share = (
        f"{100 * sum(row.values[task] / own[task] for task in own) / len(own):.1f}"
        if row.values and all(own.values())
        else "–"
    )
    average = "–" if row.average is None else f"{100 * row.average:.1f}"
    seconds = f"{row.seconds:.0f}" if row.seconds and row.role == "merge" else ""
    return [row.title, row.needs, row.chosen, *shown, average, share, seconds]


def markdown(rows: Sequence[Row], kind: str) -> str:
    """A section with the table, its caption and the findings."""
    own = rows[1].values
    titles = header(list(own))
    lines = [
        f"## {_TITLES[kind]}",
        "",
        "| " + " | ".join(titles) + " |",
        "| --- | --- | --- |" + " ---: |" * (len(titles) - 3),
        *("| " + " | ".join(cells(row, own)) + " |" for row in rows),
        "",
        CAPTION,
        "",
        *(f"- {sentence}" for sentence in findings(rows)),
        *(f"- {row.title} could not be merged: {row.problem}" for row in rows if row.problem),
    ]
    return "\n".join(lines) + "\n"


def show(rows: Sequence[Row], kind: str, console: Console) -> None:
    """Draw the table on the terminal, and say the findings."""
    own = rows[1].values
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=_TITLES[kind])
    for index, title in enumerate(header(list(own))):
        table.add_column(title, justify="left" if index < 3 else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        new = following is not None and following.role != row.role
        table.add_row(*cells(row, own), end_section=new)
    # A cut number would say nothing: the table is as wide as it must be.
    needed = Console(width=_UNLIMITED).measure(table).maximum
    Console(file=console.file, width=max(console.width, needed)).print(table)
    for sentence in findings(rows):
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)


def findings(rows: Sequence[Row]) -> list[str]:
    """How far the best merges stay behind the experts, and what is no better than one of them."""
    experts, single = rows[1], rows[2]
    merged = [row for row in rows if row.role == "merge" and row.average is not None]
    free = [row for row in merged if row.seconds is not None]
    texts = [row for row in merged if row.needs == TEXTS]
    best = _best(free)
    behind = _beside(best, experts, "the experts")
    said = [f"The best merge without gradients is {best.title} with {_percent(best)} %, {behind}."]
    if texts:
        learned = _best(texts)
        said.append(
            f"The best that learned from texts without labels is {learned.title} with "
            f"{_percent(learned)} %, {_beside(learned, best, best.title)}."
        )
    worse = [row.title for row in merged if (row.average or 0) <= (single.average or 0)]
    if worse:
        said.append(f"No better than the best single expert: {'; '.join(worse)}.")
    return said


def _best(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row.average or 0.0)


def _percent(row: Row) -> str:
    return f"{100 * (row.average or 0.0):.1f}"


def _beside(one: Row, other: Row, named: str) -> str:
    gap = 100 * ((one.average or 0.0) - (other.average or 0.0))
    if abs(gap) < 0.05:
        return f"level with {named}"
    return f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'} {named}"
