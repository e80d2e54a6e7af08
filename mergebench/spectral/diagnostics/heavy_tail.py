"""Power-law exponents of eigenvalues (WeightWatcher, arXiv:2002.06716)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Interval

from mergebench.core.site import Site
from mergebench.core.tensor import Array
from mergebench.spectral.diagnostic import Values, diagnostic, mean
from mergebench.spectral.measures import FEWEST, SMALLEST, power_law
from mergebench.spectral.spectrum import Tuned

_KEYS = ("alpha", "distance", "error", "weighted", "tail")


def _fit(values: Array, fewest: int) -> Values:
    eigenvalues = values**2
    kept = eigenvalues[eigenvalues > SMALLEST]
    found = power_law(kept) if kept.size >= fewest else None
    if found is None:
        return dict.fromkeys((*_KEYS, "smallest", "largest"))
    return {
        "alpha": found.alpha,
        "distance": found.distance,
        "error": found.error,
        "weighted": found.weighted,
        "tail": found.tail,
        "smallest": found.smallest,
        "largest": found.largest,
    }


def _combine(rows: Sequence[Values]) -> Values:
    found: Values = {"matrices": len(rows)}
    for part in ("base", "tuned"):
        held = [row[part] for row in rows]
        fitted = [each for each in held if each["alpha"] is not None]
        found[part] = {
            **{key: mean(held, key) for key in _KEYS},
            "fitted": len(fitted),
            "inside": sum(2 <= each["alpha"] <= 6 for each in fitted),
        }
    return found


def _headline(values: Values) -> dict[str, Any]:
    one, two = values["base"], values["tuned"]
    return {
        "α W": two["alpha"],
        "α W0": one["alpha"],
        "distance": two["distance"],
        "±": two["error"],
        "weighted α": two["weighted"],
    }


def _say(values: Values) -> str:
    one, two = values["base"], values["tuned"]
    if two["alpha"] is None or one["alpha"] is None:
        return "too few eigenvalues for a power law"
    return (
        f"the mean α of {two['fitted']} matrices is {two['alpha']:.2f} (base {one['alpha']:.2f}, "
        f"distance of the fit {two['distance']:.3f}); {two['inside']} lie between 2 and 6"
    )


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    uses=("base.values", "tuned", "tuned.values"),
)
def heavy_tail(
    tuned: Tuned, site: Site, *, fewest: Annotated[int, Interval(ge=2)] = FEWEST
) -> Values:
    """The power law that the largest eigenvalues of WᵀW follow: α, with the quality of the fit.

    As WeightWatcher fits it: λ = σ² above 1e-5, every λ_min tried, α = 1 + n / Σ ln(λ/λ_min), the
    one with the least Kolmogorov-Smirnov distance taken; standard error (α - 1)/√n; weighted
    α·log10 λ_max (arXiv:2002.06716). Of W and W0, since a low-rank ΔW has too few eigenvalues.
    Values of 2 to 6 are often called healthy; a distance above 0.1 says that the tail is no power
    law.

    Parameters
    ----------
    fewest : int, default 10
        Eigenvalues below which nothing is fitted.
    """
    del site
    return {
        "base": _fit(tuned.at.base_values, fewest),
        "tuned": _fit(tuned.values, fewest),
    }
