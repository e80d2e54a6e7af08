"""Singular values of the base, the update and the tuned weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Interval

from mergebench.compute.decomposition import numerical_rank
from mergebench.core.site import Site
from mergebench.spectral.diagnostic import Values, diagnostic, mean
from mergebench.spectral.measures import curve, effective_rank, rank_for, stable_rank
from mergebench.spectral.spectrum import Tuned

_SHARES = (90, 95, 99)
_PARTS = ("base", "delta", "tuned")
_KEYS = ("effective_rank", "stable_rank", "rank", "norm", "largest",
         *(f"rank{share}" for share in _SHARES))  # fmt: skip


def _combine(rows: Sequence[Values]) -> Values:
    found: Values = {"matrices": len(rows), "full": mean(rows, "full")}
    for part in _PARTS:
        if part not in rows[0]:
            continue
        held = [row[part] for row in rows]
        found[part] = {key: mean(held, key) for key in _KEYS if key != "norm"}
        found[part]["norm"] = sum(each["norm"] ** 2 for each in held) ** 0.5
    return found


def _headline(values: Values) -> dict[str, Any]:
    delta = values["delta"]
    shown = {
        "eff. rank ΔW": delta["effective_rank"],
        "stable": delta["stable_rank"],
        "rank": delta["rank"],
        **{f"{share} %": delta[f"rank{share}"] for share in _SHARES},
        "‖ΔW‖": delta["norm"],
    }
    if "base" in values:
        shown["eff. rank W0"] = values["base"]["effective_rank"]
        shown["eff. rank W"] = values["tuned"]["effective_rank"]
    return shown


def _say(values: Values) -> str:
    delta = values["delta"]
    text = (
        f"ΔW has an effective rank of {delta['effective_rank']:.1f} on average, of "
        f"{values['full']:.0f} possible, and {delta['rank90']:.1f} directions hold 90 % of its "
        "energy"
    )
    if "base" not in values:
        return text
    one, two = (values[part]["effective_rank"] for part in ("base", "tuned"))
    return f"{text}; that of the weights went from {one:.1f} to {two:.1f}"


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    base=False,
    uses=("base.values", "tuned", "tuned.values", "delta.values"),
)
def spectra(tuned: Tuned, site: Site, *, points: Annotated[int, Interval(ge=0)] = 64) -> Values:
    """Singular values, ranks and energy curves of W0, ΔW and W.

    Effective rank (exponential of the entropy of σ/Σσ), stable rank ‖W‖²F/‖W‖²₂, numerical rank
    (σ above 2⁻²⁰ of the largest), and how many directions hold 90, 95 and 99 % of Σσ². Without a
    base those of ΔW alone. Means over matrices in totals, except for norms.

    Parameters
    ----------
    points : int, default 64
        Singular values that are listed for each matrix, evenly spaced in their logarithm; 0 lists
        all.
    """
    del site
    parts = {"delta": tuned.delta_values}
    if tuned.at.base is not None:
        parts = {"base": tuned.at.base_values, **parts, "tuned": tuned.values}
    found: Values = {"full": min(tuned.at.shape)}
    for part, values in parts.items():
        found[part] = {
            "effective_rank": effective_rank(values),
            "stable_rank": stable_rank(values),
            "rank": numerical_rank(values),
            "norm": float((values @ values) ** 0.5),
            "largest": float(values[0]) if values.size else 0.0,
            **{f"rank{share}": rank_for(values, share / 100) for share in _SHARES},
        }
        found[f"{part}_curve"] = curve(values, points)
    return found
