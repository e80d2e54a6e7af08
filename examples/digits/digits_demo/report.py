"""The results as a table on the terminal, as Markdown, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import claims
from .data import DOMAINS
from .evaluate import Score
from .findings import findings, show
from .settings import Settings
from .summary import Measure, Row, summarise

_UNLIMITED = 1000
CAPTION = (
    "Test accuracy in %, mean ± standard deviation over {seeds} seed(s). Experts are measured "
    "each on its own domain, and so are methods with one model per task; normalised is the mean "
    "over the six domains of accuracy / accuracy of that domain's expert (of the same rank for "
    "LoRA merges); upright is the pretraining task."
)


def header() -> list[str]:
    """Return the column titles."""
    return ["model", "λ", *DOMAINS, "average", "normalised", "upright"]


def cells(row: Row) -> list[str]:
    """Return one line of text per column."""
    domains = [f"{row.domains[domain].mean:.1f}" for domain in DOMAINS]
    averages = [show(each) for each in (row.average, row.normalised, row.upright)]
    return [row.title, _chosen(row), *domains, *averages]


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Draw the table on the terminal, base and experts above the merges."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=CAPTION.format(seeds=len(rows[0].average.values)),
    )
    for index, title in enumerate(header()):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        new_section = following is not None and following.role != row.role
        table.add_row(*cells(row), end_section=new_section)
    # Six domains and three averages do not fit 80 columns; a cut number would say nothing.
    needed = Console(width=_UNLIMITED).measure(table).maximum
    Console(file=console.file, width=max(console.width, needed)).print(table)


def print_claims(rows: Sequence[Row], console: Console) -> None:
    """Draw what papers claim beside what was measured."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("arXiv", "claim", "difference here", "holds with"):
        table.add_column(title)
    for line in claims.table(rows):
        table.add_row(*line)
    console.print(table)


def markdown(rows: Sequence[Row]) -> str:
    """Write the table, its caption and the findings as Markdown."""
    lines = [
        "| " + " | ".join(header()) + " |",
        "| --- |" + " ---: |" * (len(header()) - 1),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
        "",
        CAPTION.format(seeds=len(rows[0].average.values)),
        "",
        *(f"- {sentence}" for sentence in findings(rows)),
        "",
        claims.markdown(rows),
    ]
    return "\n".join(lines)


def results(
    settings: Settings, scores: Mapping[int, Sequence[Score]], rows: Sequence[Row]
) -> dict[str, Any]:
    """Collect settings, the scores of every seed and the summary as JSON-ready data."""
    return {
        "settings": asdict(settings),
        "scores": {str(seed): [asdict(score) for score in each] for seed, each in scores.items()},
        "summary": [_plain(row) for row in rows],
        "findings": findings(rows),
        "claims": claims.table(rows),
    }


def write(settings: Settings, scores: Mapping[int, Sequence[Score]], out: Path) -> list[Row]:
    """Write ``digits.json`` and ``digits.md`` into ``out`` and return the rows."""
    rows = summarise(scores)
    out.mkdir(parents=True, exist_ok=True)
    collected = results(settings, scores, rows)
    (out / "digits.json").write_text(json.dumps(collected, indent=1, ensure_ascii=False) + "\n")
    (out / "digits.md").write_text(markdown(rows))
    return rows


def _chosen(row: Row) -> str:
    if row.role == "single":
        return ""
    values = sorted(set(row.chosen), key=lambda text: float(text or 0))
    return values[0] if len(values) == 1 else f"{values[0]}-{values[-1]}"


def _plain(row: Row) -> dict[str, Any]:
    return {
        "title": row.title,
        "name": row.name,
        "role": row.role,
        "chosen": list(row.chosen),
        **{key: _stats(getattr(row, key)) for key in ("average", "normalised", "upright")},
        "domains": {domain: _stats(each) for domain, each in row.domains.items()},
        "validation": {lam: _stats(each) for lam, each in row.curve.items()},
    }


def _stats(measure: Measure) -> dict[str, Any]:
    return {"mean": measure.mean, "spread": measure.spread, "seeds": list(measure.values)}
