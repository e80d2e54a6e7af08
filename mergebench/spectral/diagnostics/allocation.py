"""Where an adapter would need its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Interval

from mergebench.core.site import Site
from mergebench.spectral.diagnostic import Values, diagnostic, mean, total
from mergebench.spectral.measures import elbow, energy, pela_rank, rank_for
from mergebench.spectral.spectrum import Tuned


def _combine(rows: Sequence[Values]) -> Values:
    return {
        "matrices": len(rows),
        "needed": mean(rows, "needed"),
        "suggested": mean(rows, "suggested"),
        "elbow": mean(rows, "elbow"),
        "pela": mean(rows, "pela"),
        "parameters": int(total(rows, "parameters")),
        "kept": mean(rows, "kept"),
        "kept_uniform": mean(rows, "kept_uniform"),
    }


def _headline(values: Values) -> dict[str, Any]:
    return {
        "suggested rank": values["suggested"],
        "needed": values["needed"],
        "elbow": values["elbow"],
        "PELA": values["pela"],
        "energy kept": values["kept"],
        "of uniform": values["kept_uniform"],
        "parameters": values["parameters"],
    }


def _say(values: Values) -> str:
    if values["kept"] is None or values["kept_uniform"] is None:
        return ""
    return (
        f"ranks by energy would keep {values['kept']:.1%} of each ΔW on average, and one rank for "
        f"all {values['kept_uniform']:.1%}, with as many parameters (mergebench's rule)"
    )


def _finish(
    rows: Sequence[Values], shapes: Sequence[tuple[int, int]], *, rank: int, share: float
) -> list[Values]:
    del share
    sizes = [sum(shape) for shape in shapes]
    most = [min(shape) for shape in shapes]
    budget = sum(min(rank, top) * size for top, size in zip(most, sizes, strict=True))
    ranks = _shared_out([row["needed"] for row in rows], most, sizes, budget)
    finished = []
    for row, own, size, top in zip(rows, ranks, sizes, most, strict=True):
        reached = [0.0, *row.pop("reached")]
        finished.append(
            {
                **row,
                "suggested": own,
                "parameters": own * size,
                "kept": reached[min(own, len(reached) - 1)],
                "kept_uniform": reached[min(rank, top, len(reached) - 1)],
            }
        )
    return finished


def _shared_out(
    needed: Sequence[int], most: Sequence[int], sizes: Sequence[int], budget: int
) -> list[int]:
    """The largest multiple of the needed ranks, rounded down, at least 1, within the budget."""

    def at(scale: float) -> list[int]:
        return [
            min(max(int(scale * want), 1 if want else 0), top)
            for want, top in zip(needed, most, strict=True)
        ]

    def cost(ranks: Sequence[int]) -> int:
        return sum(each * size for each, size in zip(ranks, sizes, strict=True))

    low, high = 0.0, float(max(most, default=1))
    if cost(at(high)) <= budget:
        return at(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= budget else (low, middle)
    return at(low)


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    finish=_finish,
    base=False,
    uses=("delta.values",),
)
def allocation(
    tuned: Tuned,
    site: Site,
    *,
    rank: Annotated[int, Interval(ge=1)] = 16,
    share: Annotated[float, Interval(gt=0, le=1)] = 0.9,
) -> Values:
    """Ranks for an adapter in proportion to where the energy of ΔW lies: a rule of mergebench.

    The needed rank of a matrix is the fewest directions that hold ``share`` of Σσ² of ΔW. The
    suggested ranks are the largest common multiple of these, rounded down and at least 1, that
    takes no more parameters than rank ``rank`` everywhere. LaMDA++ and others allocate by energy
    too, with scores that are not published; this rule is ours. Beside it stand the rank at which σ
    bends farthest below the chord from the first to the last of them (elbow, ours too), and the
    rank that PELA gives every matrix of a shape.

    Parameters
    ----------
    rank : int, default 16
        The uniform rank whose number of parameters is the budget.
    share : float in (0, 1], default 0.9
    """
    del site, rank
    values = tuned.delta_values
    return {
        "needed": rank_for(values, share),
        "elbow": elbow(values),
        "pela": pela_rank(*tuned.at.shape),
        "reached": [float(each) for each in energy(values)],
    }
