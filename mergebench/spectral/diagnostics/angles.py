"""Principal angles between the spaces that updates read and write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval

from mergebench.compute.crosstalk import overlap, principal_cosines
from mergebench.core.site import Site
from mergebench.core.tensor import Array
from mergebench.spectral.diagnostic import Row, Values, diagnostic, mean
from mergebench.spectral.pairs import leading, random_overlap
from mergebench.spectral.spectrum import SiteSpectrum

_POINTS = 16
_SIDES = ("row", "column")


def _of(found: Array, dimension: int, one: int, other: int) -> Values:
    least = min(one, other)
    degrees = np.degrees(np.arccos(found))
    return {
        "overlap": overlap(found, (one, other)) if least else None,
        "random": random_overlap(dimension, one, other) if least else None,
        "smallest_angle": float(degrees[0]) if least else None,
        "largest_angle": float(degrees[-1]) if least else None,
        "mean_angle": float(degrees.mean()) if least else None,
        "dimension": dimension,
    }


def _combine(rows: Sequence[Values]) -> Values:
    found: Values = {"matrices": len(rows)}
    for side in _SIDES:
        held = [row[side] for row in rows]
        found[side] = {key: mean(held, key) for key in held[0]}
    return found


def _headline(values: Values) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for side in _SIDES:
        shown[f"{side} overlap"] = values[side]["overlap"]
        shown[f"random {side}"] = values[side]["random"]
    for side in _SIDES:
        shown[f"{side} angle °"] = values[side]["smallest_angle"]
    return shown


def _say(values: Values) -> str:
    rows, columns = (values[side] for side in _SIDES)
    if rows["overlap"] is None:
        return ""
    return (
        f"row spaces overlap by {rows['overlap']:.3f} and column spaces by "
        f"{columns['overlap']:.3f} on average; random ones would by {rows['random']:.3f} and "
        f"{columns['random']:.3f}"
    )


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    per="site",
    base=False,
    least=2,
    uses=("delta.svd",),
    work=lambda rows, columns, _: 16 * min(rows, columns) ** 2,
)
def angles(
    at: SiteSpectrum, site: Site, *, share: Annotated[float, Interval(gt=0, le=1)] = 0.9
) -> Iterator[Row]:
    """Principal angles between row spaces (what updates read) and column spaces (what they write).

    Of the fewest singular directions of each ΔW that hold ``share`` of its energy, since a full
    fine-tune spans everything. Overlap is ‖QᵢᵀQⱼ‖F / √min(rᵢ, rⱼ): 1 where one space holds the
    other, 0 where they are orthogonal; random spaces of these dimensions give √(max(rᵢ, rⱼ)/d).

    Parameters
    ----------
    share : float in (0, 1], default 0.9
        1 takes every direction above 2⁻²⁰ of the largest.
    """
    del site
    found = {model: at.delta_svd(model) for model in at.models}
    counts = {model: leading(each, share) for model, each in found.items()}
    for one, other in combinations(at.models, 2):
        first, second = found[one], found[other]
        r, q = counts[one], counts[other]
        values: Values = {"rank": r, "other_rank": q}
        for side, bases in (
            ("row", (first.Vt[:r].T, second.Vt[:q].T)),
            ("column", (first.U[:, :r], second.U[:, :q])),
        ):
            cos = principal_cosines(*bases)
            values[side] = _of(cos, len(bases[0]), r, q)
            places = np.unique(np.linspace(0, max(len(cos) - 1, 0), _POINTS).astype(int))
            values[f"{side}_cosines"] = [float(cos[place]) for place in places if len(cos)]
        yield Row(values, one, other)
