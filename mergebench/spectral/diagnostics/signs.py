"""Sign conflicts between task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from mergebench.core.site import Site
from mergebench.spectral.diagnostic import Row, Values, diagnostic, ratio, total
from mergebench.spectral.spectrum import SiteSpectrum


def _values(conflicts: int, entries: int) -> Values:
    return {"rate": ratio(conflicts, entries), "conflicts": conflicts, "entries": entries}


def _combine(rows: Sequence[Values]) -> Values:
    return _values(int(total(rows, "conflicts")), int(total(rows, "entries")))


def _headline(values: Values) -> dict[str, Any]:
    return {"conflicts": values["rate"], "entries": values["entries"]}


def _say(values: Values) -> str:
    if values["rate"] is None:
        return "no entry is changed by both"
    return f"{values['rate']:.1%} of the {values['entries']:,} entries that both change conflict"


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    per="site",
    on="tensor",
    base=False,
    least=2,
    uses=("signs",),
)
def signs(at: SiteSpectrum, site: Site) -> Iterator[Row]:
    """How often two task vectors push an entry in opposite directions.

    Of the entries that both change, the share whose signs differ: 0.5 for unrelated task vectors.
    """
    del site
    for one, other in combinations(at.models, 2):
        yield Row(_values(*at.signs[one, other]), one, other)
