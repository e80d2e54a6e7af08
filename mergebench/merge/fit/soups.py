"""Model soups from scores: uniform and greedy (arXiv:2203.05482, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mergebench.core.errors import ParameterError
from mergebench.merge.fit.candidate import Candidate
from mergebench.merge.fit.scores import Outcome, Scores, mean_value
from mergebench.recipe import ModelRef, Recipe

Accept = Literal[">", ">="]
#: Makes a candidate of a recipe and a label.
Make = Callable[[Recipe, str], Candidate]


@dataclass(frozen=True)
class Step:
    """One model that was tried.

    Attributes
    ----------
    model : str
    alone : float or None
        Mean over tasks of the metric that counts, more always better; ``None``: no score.
    together : float or None
        Of the soup with it; ``None`` for the first, and where there is no score.
    accepted : bool
    outcomes : tuple of Outcome
        Of the model alone.
    """

    model: str
    alone: float | None
    together: float | None
    accepted: bool
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Soup:
    """What was chosen.

    Attributes
    ----------
    recipe : Recipe
        The mean of the models that were taken.
    steps : tuple of Step
        In the order in which models were tried.
    value : float
        Of the soup on the selection split.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    value: float


def greedy_soup(
    recipe: Recipe,
    scores: Scores,
    split: str,
    make: Make,
    *,
    accept: Accept = ">",
    tell: Callable[[str], None] | None = None,
) -> Soup:
    """Add models, best first, while the mean of those taken scores better.

    Parameters
    ----------
    recipe : Recipe
        Its models are tried; method and weights are not looked at.
    scores : Scores
        With several tasks, the mean of their metrics decides.
    split : str
        Where models are selected; report on another one.
    make : callable
    accept : ">" or ">=", default ">"
        Whether a model that changes nothing is taken: the authors' code asks for more.
    tell : callable, optional
        Told what is being done.

    Returns
    -------
    Soup
        Its score never falls along the steps. Among models of equal scores the one listed later
        comes first, as in the authors' code.

    Raises
    ------
    ParameterError
        If no model has a score.
    ScorerError
        As :meth:`~mergebench.merge.fit.scores.Scores.of`.
    """

    def value(refs: Sequence[ModelRef], label: str) -> tuple[float | None, tuple[Outcome, ...]]:
        with make(soup_of(recipe, refs), label) as candidate:
            found = scores.of(candidate, split, tell)
        return mean_value(found), tuple(found)

    alone = [value([model], model.path) for model in recipe.models]
    ranked = [place for place, (score, _) in enumerate(alone) if score is not None]
    if not ranked:
        raise ParameterError("no model has a score", fix="mend the scorer: see what it says")
    ranked.sort(key=lambda place: (alone[place][0], place), reverse=True)
    first, *others = ranked
    taken = [recipe.models[first]]
    best = alone[first][0]
    assert best is not None
    steps = [Step(taken[0].path, best, None, True, alone[first][1])]
    for place in others:
        model = recipe.models[place]
        together, _ = value([*taken, model], f"soup of {len(taken) + 1}")
        better = together is not None and (together > best or (accept == ">=" and together == best))
        if better and together is not None:
            taken.append(model)
            best = together
        steps.append(Step(model.path, alone[place][0], together, better, alone[place][1]))
    unscored = [place for place, (score, _) in enumerate(alone) if score is None]
    steps += [Step(recipe.models[i].path, None, None, False, alone[i][1]) for i in unscored]
    return Soup(soup_of(recipe, taken), tuple(steps), best)


def soup_of(recipe: Recipe, models: Sequence[ModelRef]) -> Recipe:
    """The uniform soup of some of a recipe's models."""
    plain = tuple(replace(each, weight=1.0, params={}) for each in models)
    return replace(recipe, models=plain, method="linear", params={}, ops=(), then=(), parts=())
