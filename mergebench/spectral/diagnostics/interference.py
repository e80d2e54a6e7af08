"""Predicted interference of a merge (TSV, arXiv:2412.00081)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from annotated_types import Interval

from mergebench.core.site import Site
from mergebench.spectral.diagnostic import Row, Values, diagnostic, mean, total
from mergebench.spectral.pairs import interference as interference_of
from mergebench.spectral.spectrum import SiteSpectrum


def _combine(rows: Sequence[Values]) -> Values:
    return {
        "matrices": len(rows),
        "interference": total(rows, "interference"),
        "relative": mean(rows, "relative"),
    }


def _headline(values: Values) -> dict[str, Any]:
    return {"STI": values["interference"], "STI / Σσ": values["relative"]}


def _say(values: Values) -> str:
    if values["relative"] is None:
        return ""
    return (
        f"adding all of them predicts an interference of {values['interference']:.4g} (STI), "
        f"{values['relative']:.3g} times the singular values on average"
    )


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    per="site",
    base=False,
    least=2,
    uses=("delta.svd",),
    work=lambda rows, columns, models: 8 * 6 * min(rows, columns) ** 2 + 8 * models * rows,
)
def interference(
    at: SiteSpectrum, site: Site, *, k: Annotated[int, Interval(ge=0)] = 0
) -> Iterator[Row]:
    """Singular task interference of all tasks: Σ |(UᵀU - I) Σ (VᵀV - I)| (TSV, arXiv:2412.00081).

    U, Σ and V hold the leading ``k`` singular triplets of every task side by side. 0 where their
    directions are orthogonal. The sum grows with sizes and singular values, so the quotient with
    Σσ, which is ours, stands beside it.

    Parameters
    ----------
    k : int, default 0
        Triplets of each task; 0 takes ⌊r/N⌋, at least 1, as TSV-Merge keeps them.
    """
    del site
    if len(at.tasks) < 2:
        return
    kept = k or max(min(at.shape) // len(at.tasks), 1)
    found, relative = interference_of([at.delta_svd(model) for model in at.tasks], kept)
    yield Row({"interference": found, "relative": relative, "kept": kept, "tasks": len(at.tasks)})
