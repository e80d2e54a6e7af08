"""Scores of what is learned, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from mergebench.merge.fit.atlas import CONTROL
from mergebench.merge.fit.scores import Scores, mean_value
from mergebench.merge.fit.soups import Make
from mergebench.recipe import Recipe

if TYPE_CHECKING:
    import torch


def watch(
    recipe_of: Callable[[torch.Tensor], Recipe],
    scores: Scores,
    split: str,
    make: Make,
    forget: Collection[str] = (),
) -> Callable[[torch.Tensor, int], float | None]:
    """What :func:`~mergebench.merge.fit.learn.learn` asks for scores.

    The mean over tasks of the metric that counts. Where tasks are to be forgotten: how bad they
    are on average, as long as each of the others keeps 95% of its score at the start
    (arXiv:2407.02880, section 4.1), else no score.

    Parameters
    ----------
    recipe_of : callable
        The recipe of coefficients.
    scores : Scores
    split : str
        Which no model was learned from, nor is reported on.
    make : callable
        Makes a candidate of a recipe.
    forget : names of tasks
    """
    first: dict[str, float] = {}

    def score(coefficients: torch.Tensor, epoch: int) -> float | None:
        with make(recipe_of(coefficients), f"epoch {epoch}") as candidate:
            found = scores.of(candidate, split)
        if not forget or mean_value(found) is None:
            return mean_value(found)
        values = {each.task: each.value for each in found if each.value is not None}
        first.update({task: value for task, value in values.items() if task not in first})
        for task, value in values.items():
            if task not in forget and value < first[task] - (1 - CONTROL) * abs(first[task]):
                return None
        return -sum(values[task] for task in forget) / len(forget)

    return score
