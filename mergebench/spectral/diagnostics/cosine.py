"""Cosines between task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import isfinite, sqrt
from typing import Any

from mergebench.core.site import Site
from mergebench.spectral.diagnostic import Row, Values, diagnostic, total
from mergebench.spectral.spectrum import SiteSpectrum


def _values(inner: float, one: float, other: float) -> Values:
    length = sqrt(one) * sqrt(other)
    cosine = max(-1.0, min(inner / length, 1.0)) if length else None
    return {"cosine": cosine, "inner": inner, "squared": one, "other_squared": other}


def _combine(rows: Sequence[Values]) -> Values:
    sums = (total(rows, key) for key in ("inner", "squared", "other_squared"))
    return {"tensors": len(rows), **_values(*sums)}


def _headline(values: Values) -> dict[str, Any]:
    return {"cosine": values["cosine"]}


def _say(values: Values) -> str:
    found = values["cosine"]
    return "" if found is None else f"their cosine is {found:.3f}"


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    per="site",
    on="tensor",
    base=False,
    least=2,
    uses=("products",),
)
def cosine(at: SiteSpectrum, site: Site) -> Iterator[Row]:
    """The cosine ⟨τi, τj⟩ / (‖τi‖ ‖τj‖) of each pair of task vectors, flattened.

    Per tensor, layer, type of modules, and of the whole model, where inner products and squares
    are summed before they are divided. A tensor that a model leaves as it is counts as zeros,
    one with entries that are not finite does not count.
    """
    del site
    squares = at.looked.deltas
    known = [model for model in at.everyone if isfinite(squares.get(model, 0.0))]
    changed = set(at.models)
    for one, other in combinations(known, 2):
        if one in changed or other in changed:
            inner = at.products[one, other] if {one, other} <= changed else 0.0
            values = _values(inner, squares.get(one, 0.0), squares.get(other, 0.0))
            yield Row(values, one, other)
