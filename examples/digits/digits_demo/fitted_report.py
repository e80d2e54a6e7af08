"""The table of merges with and without data, what it shows, and what papers say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table

from .claims import Claim
from .data import DOMAINS
from .findings import show
from .summary import Measure

NOTHING, LABELS, TEXTS = "–", "labels", "images"
_UNLIMITED = 1000
CAPTION = (
    "Test accuracy in %, mean ± standard deviation over {seeds} seed(s). *Needs*: what of the "
    "validation split a merge was made with, its labels or its images alone. Experts are measured "
    "each in its own domain; normalised is the mean over the six domains of accuracy / accuracy "
    "of that domain's expert. Seconds: choosing or learning, and merging; statistics are collected "
    "before."
)
CLAIMS = (
    Claim("2203.05482", "Greedy soup", "Best single expert"),
    Claim("2203.05482", "Greedy soup", "Uniform soup"),
    Claim("2212.04089", "Task arithmetic", "Uniform soup"),
    Claim("2306.01708", "TIES", "Task arithmetic"),
    Claim("2312.06795", "Breadcrumbs", "Task arithmetic"),
    Claim("2410.17146", "LiNeS", "Task arithmetic"),
    Claim("2410.17146", "TIES, LiNeS", "TIES"),
    Claim("2310.02575", "AdaMerging, task-wise", "Task arithmetic"),
    Claim("2310.02575", "AdaMerging", "AdaMerging, task-wise"),
    Claim("2310.02575", "AdaMerging", "TIES"),
    Claim("2310.02575", "AdaMerging++", "AdaMerging"),
    Claim("2407.02880", "aTLAS", "Task arithmetic"),
    Claim("2111.09832", "Fisher", "Uniform soup"),
    Claim("2212.09849", "RegMean", "Uniform soup"),
    Claim("2212.09849", "RegMean", "Fisher"),
)


@dataclass(frozen=True)
class Line:
    """What one row reached with one seed; ``values`` maps the domains to accuracies in [0, 1]."""

    title: str
    role: str
    values: dict[str, float]
    needs: str = NOTHING
    chosen: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class FittedRow:
    """One line of the table, over the seeds, in percent."""

    title: str
    role: str
    needs: str
    domains: dict[str, Measure]
    average: Measure
    chosen: tuple[str, ...]
    seconds: tuple[float, ...] = field(default_factory=tuple)


def row_of(each: Sequence[Line]) -> FittedRow:
    """Join what all seeds have of one row."""
    first = each[0]
    domains = {d: Measure(tuple(100 * line.values[d] for line in each)) for d in DOMAINS}
    average = Measure(tuple(100 * fmean(line.values[d] for d in DOMAINS) for line in each))
    seconds = tuple(line.seconds for line in each if line.seconds is not None)
    chosen = tuple(line.chosen for line in each)
    return FittedRow(first.title, first.role, first.needs, domains, average, chosen, seconds)


def normalised(row: FittedRow, experts: FittedRow) -> Measure:
    """Accuracy / accuracy of the experts, mean over the domains, seed by seed."""
    pairs = [(row.domains[d].values, experts.domains[d].values) for d in DOMAINS]
    seeds = range(len(row.average.values))
    return Measure(tuple(100 * fmean(a[s] / b[s] for a, b in pairs) for s in seeds))


def header() -> list[str]:
    """Column titles."""
    return ["model", "needs", "chosen", *DOMAINS, "average", "normalised", "seconds"]


def cells(row: FittedRow, experts: FittedRow) -> list[str]:
    """One line of text per column."""
    seconds = f"{fmean(row.seconds):.0f}" if row.seconds else ""
    return [
        row.title,
        row.needs,
        "; ".join(dict.fromkeys(each for each in row.chosen if each)),
        *(f"{row.domains[d].mean:.1f}" for d in DOMAINS),
        show(row.average),
        show(normalised(row, experts)),
        seconds,
    ]


def claimed(rows: Sequence[FittedRow]) -> list[list[str]]:
    """Paper, claim, difference here, with how many seeds it holds; of rows that are there."""
    by_title = {row.title: row for row in rows}
    found = []
    for claim in CLAIMS:
        if claim.better in by_title and claim.worse in by_title:
            difference = by_title[claim.better].average.minus(by_title[claim.worse].average)
            won = sum(value > 0 for value in difference.values)
            said = f"{claim.better} above {claim.worse}"
            count = f"{won} of {len(difference.values)} seeds"
            found.append([claim.paper, said, show(difference, "+"), count])
    return found


def findings(rows: Sequence[FittedRow]) -> list[str]:
    """Name the best with labels, with images alone, and what one expert alone would do as well."""
    merged = [row for row in rows if row.role == "merge"]
    experts, single = rows[1], rows[2]
    said = []
    for needs, words in (
        (LABELS, "chosen or learned with labels"),
        (TEXTS, "learned from images without labels"),
    ):
        some = [row for row in merged if row.needs == needs]
        if some:
            best = max(some, key=lambda row: row.average.mean)
            gap = show(experts.average.minus(best.average))
            said.append(
                f"Best of what is {words}: {best.title} with {show(best.average)} %, {gap} "
                "points below the experts."
            )
    worse = [row.title for row in merged if row.average.mean <= single.average.mean]
    if worse:
        said.append(f"No better than the best single expert: {'; '.join(worse)}.")
    return said


def markdown(rows: Sequence[FittedRow]) -> str:
    """The table, its caption, the findings and the claims."""
    titles = header()
    lines = [
        "| " + " | ".join(titles) + " |",
        "| --- | --- | --- |" + " ---: |" * (len(titles) - 3),
        *("| " + " | ".join(cells(row, rows[1])) + " |" for row in rows),
        "",
        CAPTION.format(seeds=len(rows[0].average.values)),
        "",
        *(f"- {sentence}" for sentence in findings(rows)),
        "",
        "| paper | claim | difference here | holds with |",
        "| --- | --- | ---: | ---: |",
    ]
    for paper, *rest in claimed(rows):
        lines.append(f"| [{paper}](https://arxiv.org/abs/{paper}) | " + " | ".join(rest) + " |")
    return "\n".join(lines) + "\n"


def show_table(rows: Sequence[FittedRow], console: Console) -> None:
    """Draw the table on the terminal, and say the findings."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, title in enumerate(header()):
        table.add_column(title, justify="left" if index < 3 else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        new = following is not None and following.role != row.role
        table.add_row(*cells(row, rows[1]), end_section=new)
    needed = Console(width=_UNLIMITED).measure(table).maximum
    Console(file=console.file, width=max(console.width, needed)).print(table)
    for sentence in findings(rows):
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)
