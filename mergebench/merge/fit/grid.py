"""Every combination of listed values, scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mergebench.core.errors import ParameterError
from mergebench.core.schedule import to_plain
from mergebench.core.version import own_version
from mergebench.merge.fit.scores import Outcome, Scores, mean_value
from mergebench.merge.fit.soups import Make
from mergebench.merge.fit.space import fixed_and_free, variants_of
from mergebench.recipe import Recipe


@dataclass(frozen=True)
class Trial:
    """One recipe that was scored.

    Attributes
    ----------
    label : str
        Such as ``lam=0.3,density=0.2``.
    recipe : Recipe
    outcomes : tuple of Outcome
        One per task.
    values : mapping of parameter to value
        Those that were listed.
    """

    label: str
    recipe: Recipe
    outcomes: tuple[Outcome, ...]
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """Mean over tasks of the metric that counts, more always better."""
        return mean_value(self.outcomes)

    @property
    def seconds(self) -> float:
        """What merging and scoring took."""
        return sum(each.seconds + each.merging for each in self.outcomes)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial of the highest value; the first among equals.

    Raises
    ------
    ParameterError
        If none has one.
    """
    scored = [each for each in trials if each.value is not None]
    if not scored:
        why = trials[0].outcomes[0].problem if trials and trials[0].outcomes else "nothing tried"
        raise ParameterError("no trial has a score", got=why)
    return max(scored, key=lambda each: each.value or 0.0)


def grid(
    recipe: Recipe,
    scores: Scores,
    split: str,
    make: Make,
    tell: Callable[[str], None] | None = None,
    *,
    alone: bool = True,
) -> list[Trial]:
    """Score every combination of the values that a recipe lists, in their order.

    Every recipe is planned before the first is scored: an error in the last costs nothing.

    Parameters
    ----------
    recipe : Recipe
        With lists of values among the parameters of its method and of the ops after it (see
        :func:`~mergebench.merge.fit.space.fixed_and_free`); without any it is the only trial.
    scores, split, make, tell
        As for :func:`~mergebench.merge.fit.soups.greedy_soup`.
    alone : bool, default True
        Score a recipe without lists too, where nothing is to be chosen.

    Raises
    ------
    MergebenchError
        If a variant cannot be merged.
    ScorerError
        As :meth:`~mergebench.merge.fit.scores.Scores.of`.
    """
    plain, dimensions = fixed_and_free(recipe)
    found = variants_of(plain, dimensions)
    candidates = [(label, each, make(each, label or "merge")) for label, each in found]
    for _, _, candidate in candidates:
        _ = candidate.plan
    if not (dimensions or alone):
        return [Trial(label, each, ()) for label, each, _ in candidates]
    listed = product(*(each.listed for each in dimensions))
    names = [each.name for each in dimensions]
    trials = []
    for (label, each, candidate), values in zip(candidates, listed, strict=True):
        with candidate:
            outcomes = tuple(scores.of(candidate, split, tell))
        trials.append(Trial(label, each, outcomes, dict(zip(names, values, strict=True))))
    return trials


def record(
    trials: Sequence[Trial], best: Trial, tasks: Sequence[str], split: str
) -> dict[str, Any]:
    """Plain data, as :meth:`mergebench.merge.fit.search.Found.to_json` has them of a search."""
    return {
        "mergebench": own_version(),
        "method": best.recipe.method,
        "tasks": list(tasks),
        "select": split,
        "sampler": "grid",
        "seed": 0,
        "chosen": best.label or "merge",
        "log": [],
        "trials": [
            {
                "number": number,
                "label": each.label or "merge",
                "values": {name: to_plain(value) for name, value in each.values.items()},
                "state": "failed" if each.value is None else "done",
                "value": each.value,
                "tasks": {outcome.task: outcome.value for outcome in each.outcomes},
                "seconds": each.seconds,
                "problem": next((o.problem for o in each.outcomes if o.problem), ""),
            }
            for number, each in enumerate(trials)
        ],
        "recipe": best.recipe.to_dict(),
    }
