"""Whether task vectors change the same entries most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Annotated, Any

from annotated_types import Interval

from mergebench.core.site import Site
from mergebench.spectral.diagnostic import Row, Values, diagnostic, ratio, total
from mergebench.spectral.spectrum import SiteSpectrum


def _values(shared: int, least: int, expected: float) -> Values:
    return {
        "overlap": ratio(shared, least),
        "shared": shared,
        "least": least,
        "expected": expected,
        "random": ratio(expected, least),
    }


def _combine(rows: Sequence[Values]) -> Values:
    shared, least = (int(total(rows, key)) for key in ("shared", "least"))
    return {"matrices": len(rows), **_values(shared, least, total(rows, "expected"))}


def _headline(values: Values) -> dict[str, Any]:
    return {"overlap": values["overlap"], "random": values["random"]}


def _say(values: Values) -> str:
    if values["overlap"] is None:
        return ""
    return (
        f"{values['overlap']:.1%} of the entries that one changes most are among those of the "
        f"other, and {values['random']:.1%} would be by chance (|A∩B|/min, mergebench's rule)"
    )


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    per="site",
    base=False,
    least=2,
    uses=("entries",),
)
def overlap(
    at: SiteSpectrum, site: Site, *, density: Annotated[float, Interval(gt=0, le=1)] = 0.1
) -> Iterator[Row]:
    """|A∩B| / min(|A|, |B|) of the entries of each matrix that two models change most: our rule.

    A and B are the ⌊density · d⌋ largest magnitudes of each ΔW, at least one, and never zeros. Of
    random supports about ``density`` would be shared.

    Parameters
    ----------
    density : float in (0, 1], default 0.1
    """
    del site
    size = at.site.size
    kept = max(int(density * size), 1)
    shared = at.shared_supports(kept)
    for one, other in combinations(at.models, 2):
        first, second = shared[one, one], shared[other, other]
        values = _values(shared[one, other], min(first, second), first * second / size)
        yield Row(values, one, other)
