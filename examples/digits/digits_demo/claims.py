"""What papers claim of their methods, beside what these digits show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .findings import show
from .summary import Row


@dataclass(frozen=True)
class Claim:
    """``better`` reaches a higher average than ``worse``, says ``paper``.

    ``margin`` is how many points less still count as the same, for claims of no loss.
    """

    paper: str
    better: str
    worse: str
    margin: float = 0.0


CLAIMS = (
    Claim("2306.01708", "ties-full", "task_arithmetic-full"),
    Claim("2312.06795", "breadcrumbs-full", "task_arithmetic-full"),
    Claim("2311.03099", "dare-full", "task_arithmetic-full", margin=1.0),
    Claim("2311.03099", "dare_ties-full", "ties-full"),
    Claim("2406.11617", "della-full", "dare_ties-full"),
    Claim("2405.07813", "consensus_ta-full", "task_arithmetic-full"),
    Claim("2410.02396", "pcb-full", "ties-full"),
    Claim("2408.07990", "sce-full", "ties-full"),
    Claim("2601.13572", "ramplus_tl-full", "ties-full"),
    Claim("2410.17146", "lines-full", "task_arithmetic-full"),
    Claim("2410.17146", "ties+lines-full", "ties-full"),
    Claim("2602.05536", "task_arithmetic+svc-full", "task_arithmetic-full"),
    Claim("2602.05536", "ties+svc-full", "ties-full"),
    Claim("2502.10339", "star-full", "ties-full"),
    Claim("2412.12153", "cart-full", "task_arithmetic-full"),
    Claim("2412.00081", "tsv_merge-full", "consensus_ta-full"),
    Claim("2502.04959", "iso_c-full", "tsv_merge-full"),
    Claim("2502.04959", "iso_cts-full", "iso_c-full"),
    Claim("2602.09413", "iso_c+larv-full", "iso_c-full"),
    Claim("2503.08099", "wudi-full", "tsv_merge-full"),
    Claim("2405.17461", "emr-full", "tsv_merge-full"),
    Claim("2412.00081", "tsv_compress-full", "experts-full", margin=3.0),
    Claim("2410.19735", "knots_ties-lora16", "ties-lora16"),
    Claim("2509.17786", "core_ties-lora16", "knots_ties-lora16"),
)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line per claim on models that ``rows`` have: paper, claim, difference, whether it holds.

    Differences are of averages over the domains, seed by seed: both models of a seed come from the
    same experts.
    """
    by_name = {row.name: row for row in rows}
    lines = []
    for claim in CLAIMS:
        if claim.better not in by_name or claim.worse not in by_name:
            continue
        better, worse = by_name[claim.better], by_name[claim.worse]
        difference = better.average.minus(worse.average)
        won = sum(value > -claim.margin for value in difference.values)
        relation = f"at most {claim.margin:g} below" if claim.margin else "above"
        lines.append(
            [
                claim.paper,
                f"{better.title} {relation} {worse.title}",
                show(difference, "+"),
                f"{won} of {len(difference.values)} seeds",
            ]
        )
    return lines


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    lines = ["| paper | claim | difference here | holds with |", "| --- | --- | ---: | ---: |"]
    for paper, *cells in table(rows):
        lines.append(f"| [{paper}](https://arxiv.org/abs/{paper}) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
