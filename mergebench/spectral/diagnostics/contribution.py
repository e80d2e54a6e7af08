"""A weight-only stand-in for TuCo."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

from mergebench.core.site import Site
from mergebench.spectral.diagnostic import Values, diagnostic, total
from mergebench.spectral.spectrum import Tuned


def _values(base: float, delta: float) -> Values:
    whole = sqrt(base) + sqrt(delta)
    return {
        "base_squared": base,
        "delta_squared": delta,
        "proxy": sqrt(delta) / whole if whole else None,
        "relative": sqrt(delta / base) if base else None,
    }


def _combine(rows: Sequence[Values]) -> Values:
    return {
        "tensors": len(rows),
        **_values(total(rows, "base_squared"), total(rows, "delta_squared")),
    }


def _headline(values: Values) -> dict[str, Any]:
    return {"proxy": values["proxy"], "‖ΔW‖/‖W0‖": values["relative"]}


def _say(values: Values) -> str:
    if values["proxy"] is None or values["relative"] is None:
        return ""
    return (
        f"‖ΔW‖ is {values['relative']:.2%} of ‖W0‖; the weight-only proxy of the tuning "
        f"contribution is {values['proxy']:.4f} (TuCo itself needs prompts)"
    )


@diagnostic(combine=_combine, headline=_headline, say=_say, on="tensor")
def contribution(tuned: Tuned, site: Site) -> Values:
    """‖ΔW‖ / (‖W0‖ + ‖ΔW‖), a proxy of the tuning contribution from weights alone.

    TuCo compares what tuned and base layers add to the residual stream, and needs prompts and
    forward passes of both models. This number depends on no input and must not be quoted as TuCo.
    Totals are of all tensors together, not means.
    """
    del site
    return _values(tuned.at.looked.base or 0.0, tuned.at.looked.deltas[tuned.model])
