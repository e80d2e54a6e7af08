"""How far singular values and vectors moved (SORSA, arXiv:2409.00055)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergebench.compute.decomposition import Decomposition
from mergebench.core.site import Site
from mergebench.spectral.diagnostic import Values, diagnostic, mean
from mergebench.spectral.spectrum import Tuned


def moved(before: Decomposition, after: Decomposition) -> Values:
    """SORSA's ΔΣ and ΔD, by place and by assignment.

    Over as many triplets as both matrices have; zero ones have no directions.
    """
    count = min(before.rank, after.rank)
    if count == 0:
        return {"count": 0, "sigma": None, "direction": None, "sigma_matched": None,
                "direction_matched": None, "moved": None}  # fmt: skip
    left = np.abs(before.U[:, :count].T @ after.U[:, :count]).astype(np.float64)
    right = np.abs(before.Vt[:count] @ after.Vt[:count].T).astype(np.float64)
    alike = (left + right) / 2
    from scipy.optimize import linear_sum_assignment

    rows, places = linear_sum_assignment(alike, maximize=True)
    old, new = before.S[:count], after.S[:count]
    return {
        "count": count,
        "sigma": float(np.abs(new - old).mean()),
        "direction": _turned(np.diagonal(alike)),
        "sigma_matched": float(np.abs(new[places] - old[rows]).mean()),
        "direction_matched": _turned(alike[rows, places]),
        "moved": float(np.mean(places != rows)),
    }


def _turned(alike: Any) -> float:
    return max(1.0 - float(np.mean(alike)), 0.0)


def _combine(rows: Sequence[Values]) -> Values:
    keys = ("sigma", "direction", "sigma_matched", "direction_matched", "moved")
    return {"matrices": len(rows), **{key: mean(rows, key) for key in keys}}


def _headline(values: Values) -> dict[str, Any]:
    return {
        "ΔD": values["direction"],
        "ΔD matched": values["direction_matched"],
        "ΔΣ": values["sigma"],
        "ΔΣ matched": values["sigma_matched"],
        "changed place": values["moved"],
    }


def _say(values: Values) -> str:
    if values["direction"] is None:
        return ""
    return (
        f"singular values moved by {values['sigma']:.3g} (ΔΣ) and directions by "
        f"{values['direction']:.3g} (ΔD) on average; {values['direction_matched']:.3g} where each "
        f"is compared with its counterpart, {values['moved']:.0%} of which changed place"
    )


def _work(rows: int, columns: int, _: int) -> int:
    return 8 * 5 * min(rows, columns) ** 2


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    uses=("base.svd", "tuned", "tuned.svd"),
    work=_work,
)
def rotation(tuned: Tuned, site: Site) -> Values:
    """Movement of singular values and vectors: SORSA's ΔΣ and ΔD.

    ΔΣ = mean |σ(t) - σ(0)|; ΔD = 1 - ½ mean(|⟨u(t), u(0)⟩| + |⟨v(t), v(0)⟩|) (arXiv:2409.00055).
    By place, as the paper has them, two singular values that cross look like a rotation; the
    matched numbers compare each triplet with the one that an assignment gives it, which maximizes
    the sum of |cos|.
    """
    del site
    return moved(tuned.at.base_svd, tuned.svd)
