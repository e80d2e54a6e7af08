"""Means, spreads and normalised accuracies over seeds, and what they do not support."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .data import DOMAINS, UPRIGHT
from .evaluate import Score, domain_mean


@dataclass(frozen=True)
class Measure:
    """One number per seed, in percent."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The sample standard deviation over the seeds; None for a single seed."""
        return stdev(self.values) if len(self.values) > 1 else None

    def minus(self, other: Measure) -> Measure:
        """Subtract seed by seed: both models of a seed share its split and its base."""
        return Measure(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``domains`` holds the absolute accuracy on each domain, ``average`` their mean,
    ``normalised`` the mean of accuracy over the accuracy of the domain's expert, ``upright``
    the control, ``curve`` the mean validation accuracy per λ. All are percentages.
    """

    title: str
    name: str
    role: str
    chosen: tuple[str, ...]
    domains: dict[str, Measure]
    average: Measure
    normalised: Measure
    upright: Measure
    curve: dict[str, Measure]


def normalised(score: Score, experts: Score) -> float:
    """Average accuracy / expert accuracy over the six domains."""
    return fmean(score.test[domain] / experts.test[domain] for domain in DOMAINS)


def summarise(scores: Mapping[int, Sequence[Score]]) -> list[Row]:
    """Join the scores of all seeds into rows; every seed lists the same rows in one order."""
    references = {
        seed: {score.name.removeprefix("experts-"): score for score in each if _expert(score)}
        for seed, each in scores.items()
    }
    rows = []
    for group in zip(*scores.values(), strict=True):
        first = group[0]
        by_seed = dict(zip(scores, group, strict=True))
        rows.append(
            Row(
                title=first.title,
                name=first.name,
                role=first.role,
                chosen=tuple(score.chosen for score in group),
                domains={d: _measure(score.test[d] for score in group) for d in DOMAINS},
                average=_measure(domain_mean(score.test) for score in group),
                normalised=_measure(
                    normalised(score, references[seed][score.reference])
                    for seed, score in by_seed.items()
                ),
                upright=_measure(score.test[UPRIGHT] for score in group),
                curve={
                    key: _measure(score.validation[key] for score in group)
                    for key in first.validation
                },
            )
        )
    return rows


def _expert(score: Score) -> bool:
    return score.role == "experts"


def _measure(values: Iterable[float]) -> Measure:
    return Measure(tuple(100 * value for value in values))
