"""Intruder dimensions (arXiv:2410.21228)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from annotated_types import Interval

from mergebench.compute.intruders import intruders as find
from mergebench.core.errors import ParameterError
from mergebench.core.params import Examples
from mergebench.core.site import Site
from mergebench.spectral.baseline import expected_largest
from mergebench.spectral.diagnostic import Values, diagnostic, total
from mergebench.spectral.spectrum import Tuned


def parse_epsilons(text: str) -> tuple[float, ...]:
    """Thresholds written ``0.5`` or ``0.3,0.5,0.7``, each once, rising.

    Raises
    ------
    ParameterError
        For other than numbers in (0, 1].
    """
    found: set[float] = set()
    for part in str(text).strip("[]").split(","):
        try:
            number = float(part)
        except ValueError:
            number = 0.0
        if not 0 < number <= 1:
            raise ParameterError(
                "intruders: `epsilon` must be numbers in (0, 1], such as 0.3,0.5", got=f"{part!r}"
            )
        found.add(number)
    return tuple(sorted(found))


def _combine(rows: Sequence[Values]) -> Values:
    epsilons = [each["epsilon"] for each in rows[0]["thresholds"]]
    squared = total(rows, "squared")
    thresholds = []
    for place, epsilon in enumerate(epsilons):
        held = [row["thresholds"][place] for row in rows]
        energy = sum(e["energy"] * r["squared"] for e, r in zip(held, rows, strict=True))
        thresholds.append(
            {
                "epsilon": epsilon,
                "count": sum(each["count"] for each in held),
                "matrices": sum(each["count"] > 0 for each in held),
                "energy": energy / squared if squared > 0 else 0.0,
            }
        )
    sure = [row["least_cosine"] for row in rows if row["least_cosine"] is not None]
    baselines = [row["baseline"] for row in rows]
    return {
        "matrices": len(rows),
        "looked": int(total(rows, "looked")),
        "exact": int(total(rows, "exact")),
        "certified": int(total(rows, "certified")),
        "loose": int(total(rows, "loose")),
        "squared": squared,
        "least_cosine": min(sure, default=None),
        "baseline": sum(baselines) / len(baselines),
        "baseline_least": min(rows[i].get("baseline_least", b) for i, b in enumerate(baselines)),
        "baseline_most": max(rows[i].get("baseline_most", b) for i, b in enumerate(baselines)),
        "thresholds": thresholds,
    }


def _headline(values: Values) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for each in values["thresholds"]:
        shown[f"<{each['epsilon']:g}"] = each["count"]
    shown["of"] = values["looked"]
    for each in values["thresholds"]:
        shown[f"energy <{each['epsilon']:g}"] = each["energy"]
    shown["least cos"] = values["least_cosine"]
    shown["random"] = values["baseline"]
    return shown


def _say(values: Values) -> str:
    if not values["looked"]:
        return "no leading direction to look at"
    parts = [
        f"{each['count']} below {each['epsilon']:g} ({each['energy']:.2%} of the energy)"
        for each in values["thresholds"]
    ]
    low, high = values["baseline_least"], values["baseline_most"]
    random = f"{low:.3f}" if high - low < 5e-4 else f"{low:.3f} to {high:.3f}"
    status = "exact"
    if values["certified"]:
        status = f"{values['certified']} certified by bounds, {values['exact']} exact"
    loose = f"; {values['loose']} are not told apart from a neighbour" if values["loose"] else ""
    blind = [each["epsilon"] for each in values["thresholds"] if each["epsilon"] <= low]
    if blind:
        loose += f"; not even random directions are below {max(blind):g} in matrices so small"
    return (
        f"of {values['looked']} leading directions in {values['matrices']} matrices, by their "
        f"largest cosine with the base: {', '.join(parts)}; random directions would have {random} "
        f"({status}{loose})"
    )


@diagnostic(combine=_combine, headline=_headline, say=_say, uses=("base.top", "tuned", "tuned.top"))
def intruders(
    tuned: Tuned,
    site: Site,
    *,
    k: Annotated[int, Interval(ge=1)] = 10,
    epsilon: Annotated[str, Examples(("0.5", "0.3,0.5,0.7"))] = "0.5",
    side: Literal["left", "right"] = "left",
    signed: bool = False,
    exact: bool = False,
) -> Values:
    """Leading directions of the tuned weight that the base does not have.

    For each of the ``k`` leading singular vectors of W the largest |cos| with any singular vector
    of W0; an intruder is below ε (arXiv:2410.21228). Counts saturate and random directions always
    count, so the share of the energy ‖W‖² that intruders hold and the cosine that a random
    direction would have stand beside them.

    Parameters
    ----------
    k : int, default 10
        Leading directions of each matrix.
    epsilon : text, default 0.5
        One threshold or several.
    side : left (default, the output side) or right
    signed : bool, default false
        The largest cosine, as the paper writes it, rather than the largest |cos|.
    exact : bool, default false
        Decompose every matrix, also where bounds settle every threshold.
    """
    del site
    epsilons = parse_epsilons(epsilon)
    found = find(
        tuned.at.base_matrix,
        tuned.matrix,
        k=k,
        epsilons=epsilons,
        side=side,
        signed=signed,
        factors=tuned.factors,
        base_svd=lambda: tuned.at.base_svd,
        tuned_svd=tuned.known_svd,
        exact=exact,
    )
    kinds = [each.status for each in found.directions]
    return {
        "looked": len(kinds),
        "exact": kinds.count("exact"),
        "certified": kinds.count("certified"),
        "loose": sum(each.gap is not None and each.gap < 1e-6 for each in found.directions),
        "dimension": found.dimension,
        "vectors": found.vectors,
        "squared": found.squared,
        "baseline": expected_largest(found.dimension, found.vectors, signed),
        "least_cosine": min((each.cosine for each in found.directions), default=None),
        "thresholds": [
            {"epsilon": each, "count": found.count(each), "energy": found.energy(each)}
            for each in epsilons
        ],
        "directions": [
            {**asdict(each), "intruder": dict(zip(map(str, epsilons), each.intruder, strict=True))}
            for each in found.directions
        ],
    }
