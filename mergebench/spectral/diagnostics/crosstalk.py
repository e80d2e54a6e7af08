"""Crosstalk between updates (arXiv:2312.02432)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from mergebench.compute.crosstalk import crosstalk_of
from mergebench.core.site import Site
from mergebench.spectral.diagnostic import Row, Values, diagnostic, mean
from mergebench.spectral.spectrum import SiteSpectrum


def _combine(rows: Sequence[Values]) -> Values:
    found = [row["most"] if "most" in row else row["crosstalk"] for row in rows]
    most = max((each for each in found if each is not None), default=None)
    return {"matrices": len(rows), "crosstalk": mean(rows, "crosstalk"), "most": most}


def _headline(values: Values) -> dict[str, Any]:
    return {"crosstalk": values["crosstalk"], "most": values.get("most", values["crosstalk"])}


def _say(values: Values) -> str:
    if values["crosstalk"] is None:
        return ""
    return f"their crosstalk is {values['crosstalk']:.3f} on average, at most {values['most']:.3f}"


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    per="site",
    base=False,
    least=2,
    uses=("delta.svd",),
    work=lambda rows, columns, _: 24 * min(rows, columns) ** 2,
)
def crosstalk(at: SiteSpectrum, site: Site) -> Iterator[Row]:
    """‖ΔWᵢ ΔWⱼᵀ‖ / (‖ΔWᵢ‖ ‖ΔWⱼ‖): how far one update answers inputs of the other.

    0 where the row spaces are orthogonal, so that summed updates do not disturb each other
    (arXiv:2312.02432, section 3.2).
    """
    del site
    found = {model: at.delta_svd(model) for model in at.models}
    for one, other in combinations(at.models, 2):
        # Of zeros it is not defined.
        some = found[one].rank and found[other].rank
        value = crosstalk_of(found[one], found[other]) if some else None
        yield Row({"crosstalk": value}, one, other)
