"""Sentences about what a table shows, derived from its numbers and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from .data import DOMAINS
from .summary import Measure, Row

#: More comparisons than that are told together.
_MANY = 12


def findings(rows: Sequence[Row]) -> list[str]:
    """Say what merging gained, and name everything that did not help."""
    by_name = {row.name: row for row in rows}
    base, experts, single = by_name["base"], by_name["experts-full"], by_name["single"]
    merged = [row for row in rows if row.role == "merge"]
    return [
        _headline(base, experts, merged),
        _against_single(single, merged),
        *_hurt_domains(base, merged),
        _upright(base, merged),
        *edges(merged),
        *_against_sums([(by_name[name], by_name[other]) for name, other in _comparisons(merged)]),
    ]


def show(measure: Measure, sign: str = "") -> str:
    """Write ``mean ± spread`` with one decimal; the spread is left out for a single seed."""
    text = f"{measure.mean:{sign}.1f}"
    return text if measure.spread is None else f"{text} ± {measure.spread:.1f}"


def _headline(base: Row, experts: Row, merged: Sequence[Row]) -> str:
    top = max(merged, key=lambda row: row.average.mean)
    gap = experts.average.mean - base.average.mean
    share = 100 * (top.average.mean - base.average.mean) / gap
    return (
        f"The best merge is {top.title} with {show(top.average)} % on average, against "
        f"{show(base.average)} % for the base and {show(experts.average)} % for one expert per "
        f"domain: it closes {share:.0f} % of that gap."
    )


def _against_single(single: Row, merged: Sequence[Row]) -> str:
    below = [row.title for row in merged if row.average.mean <= single.average.mean]
    reference = f"the best single expert ({show(single.average)} %)"
    if not below:
        return f"Every merge beats {reference}."
    return f"No better than {reference}: {'; '.join(below)}."


def _hurt_domains(base: Row, merged: Sequence[Row]) -> list[str]:
    """Name, per domain, the merges below the base; a mean over seeds decides."""
    found = []
    for domain in DOMAINS:
        changes = {
            row.title: row.domains[domain].minus(base.domains[domain]).mean for row in merged
        }
        losses = [f"{title} {change:+.1f}" for title, change in changes.items() if change < 0]
        if losses:
            found.append(f"Worse than the unmerged base on {domain}: {'; '.join(losses)}.")
    return found


def _upright(base: Row, merged: Sequence[Row]) -> str:
    changes = {row.title: row.upright.minus(base.upright).mean for row in merged}
    most, least = min(changes, key=changes.__getitem__), max(changes, key=changes.__getitem__)
    return (
        f"Upright digits change by {changes[least]:+.1f} ({least}) to {changes[most]:+.1f} points "
        f"({most}), from {show(base.upright)} %."
    )


def _comparisons(merged: Sequence[Row]) -> list[tuple[str, str]]:
    """Pair every merge with task arithmetic: on the same experts, or full for LoRA."""
    full = "task_arithmetic-full"
    pairs = []
    for row in merged:
        method, _, kind = row.name.partition("-")
        if method != "task_arithmetic":
            pairs.append((row.name, f"task_arithmetic-{kind}"))
        elif row.name != full:
            pairs.append((row.name, full))
    return pairs


def _against_sums(pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """A sentence for every pair, or for many of them one for every verdict."""
    judged = [(row, other, row.average.minus(other.average)) for row, other in pairs]
    if len(judged) <= _MANY:
        return [
            f"{row.title} against {other.title}: {show(change, '+')} points; {_verdict(change)}."
            for row, other, change in judged
        ]
    verdicts: dict[str, list[str]] = {}
    for row, _, change in sorted(judged, key=lambda each: -each[2].mean):
        verdicts.setdefault(_verdict(change), []).append(f"{row.title} {change.mean:+.1f}")
    return [
        f"Against task arithmetic (LoRAs: of their rank, and that of full), {verdict}: "
        + "; ".join(titles)
        + "."
        for verdict, titles in verdicts.items()
    ]


def _verdict(difference: Measure) -> str:
    """Judge a paired difference: seeds share their split and base, so they are compared."""
    if all(value > 0 for value in difference.values):
        return "helps with every seed"
    if all(value <= 0 for value in difference.values):
        return "does not help with any seed"
    return "helps with some seeds only"


def edges(rows: Sequence[Row]) -> list[str]:
    """Name the merges whose best λ may lie beyond the grid: with some seed it is at an end."""
    found = []
    for row in rows:
        grid = list(row.curve)
        ends = [value for value in (*grid[:1], *grid[-1:]) if value in row.chosen]
        if len(grid) > 1 and ends:
            found.append(f"{row.title} ({' and '.join(ends)})")
    return [f"At an end of the grid of λ with some seed: {'; '.join(found)}."] if found else []
