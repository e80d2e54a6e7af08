"""Values of parameters by trial and error, with a memory (Optuna's TPE, arXiv:1907.10902)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.params import bind
from mergebench.core.version import own_version
from mergebench.merge.fit.ranges import Choices, Range, Values
from mergebench.merge.fit.scores import Scores
from mergebench.merge.fit.soups import Make
from mergebench.merge.fit.space import Dimension, declared_params, placed
from mergebench.merge.fit.study import STARTUP, Attempt, Sampler, Study, Trial
from mergebench.merge.method import METHODS
from mergebench.recipe import Recipe

Prune = Literal["hopeless", "median", "none"]


@dataclass(frozen=True)
class Settings:
    """How a search goes.

    Attributes
    ----------
    trials : int, default 50
        In all, those of earlier runs of the same study counted.
    sampler : tpe or random, default tpe
    seed : int, default 0
    patience : int, default 0
        Stop after so many trials without a better one; 0: never.
    prune : hopeless, median or none, default hopeless
        When a trial on several tasks is given up after some of them: if it would not be the best
        even with the best value that any trial has on each of the others; if the median of earlier
        trials was better; or never. Not before 10 trials.
    """

    trials: int = 50
    sampler: Sampler = "tpe"
    seed: int = 0
    patience: int = 0
    prune: Prune = "hopeless"


@dataclass(frozen=True)
class Found:
    """What a search has come to.

    Attributes
    ----------
    attempts : tuple of Attempt
        In order, those of earlier runs included.
    best : Attempt
        The first of the highest value.
    recipe : Recipe
        With the values of the best.
    tasks : tuple of str
    select : str
        The split.
    settings : Settings
    dimensions : tuple of Dimension
    """

    attempts: tuple[Attempt, ...]
    best: Attempt
    recipe: Recipe
    tasks: tuple[str, ...]
    select: str
    settings: Settings
    dimensions: tuple[Dimension, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "mergebench": own_version(),
            "method": self.recipe.method,
            "tasks": list(self.tasks),
            "select": self.select,
            "sampler": self.settings.sampler,
            "seed": self.settings.seed,
            "chosen": self.best.label,
            "log": [
                each.name for each in self.dimensions
                if isinstance(each.values, Range) and each.values.log
            ],
            "trials": [each.to_json() for each in self.attempts],
            "recipe": self.recipe.to_dict(),
        }  # fmt: skip


def search(
    recipe: Recipe,
    dimensions: Sequence[Dimension],
    scores: Scores,
    split: str,
    make: Make,
    settings: Settings,
    *,
    file: Path | None = None,
    tell: Callable[[str], None] | None = None,
    ended: Callable[[Attempt], None] | None = None,
) -> Found:
    """Try values, look at what came of them, try others.

    The first trial has the method's defaults where they are in range, so that the result is no
    worse on ``split`` than they are. With several tasks the mean decides.

    Parameters
    ----------
    recipe : Recipe
        With everything that is fixed.
    dimensions : sequence of Dimension
        From :func:`~mergebench.merge.fit.space.fixed_and_free` or
        :func:`~mergebench.merge.fit.space.numbers_of`.
    scores, split, make, tell
        As for :func:`~mergebench.merge.fit.soups.greedy_soup`. Scorers that ask for arrays get
        them from memory; a folder is written only for those that ask for one.
    settings : Settings
    file : Path, optional
        Journal of the study. Whatever ends the search, finished trials are in it, and the same
        call goes on behind them.
    ended : callable, optional
        Told of every trial, of those of earlier runs too.

    Raises
    ------
    ParameterError
        If the file is of another study, or no trial has a score.
    ScorerError
        As :meth:`~mergebench.merge.fit.scores.Scores.of`; the trial is tried again by the next
        run.
    MergebenchError
        If the models cannot be merged at all.
    """
    if not dimensions:
        raise ParameterError("nothing to search", fix="-p NAME=LOW:HIGH")
    start = defaults(recipe, dimensions)
    # What is wrong with the models shows here, before anything is tried.
    first = [start.get(each.name, _first(each.values)) for each in dimensions]
    key = make(placed(recipe, dimensions, first), "the start").key
    about = {
        "models or parameters": key,
        "ranges": json.dumps([[each.name, repr(each.values)] for each in dimensions]),
        "tasks": json.dumps([[task.name, task.spec] for task in scores.tasks]),
        "split": split,
        "sampler or seed": f"{settings.sampler} {settings.seed}",
    }
    study = Study(file, about, dimensions, settings.sampler, settings.seed)
    for attempt in study.attempts:
        if ended is not None:
            ended(attempt)
    while len(study.attempts) < settings.trials and not _exhausted(study.attempts, settings):
        trial = study.ask(start)
        try:
            attempt = _tried(
                trial, recipe, dimensions, study.attempts, scores, split, make, settings, tell
            )
        except BaseException:
            trial.drop()
            raise
        if ended is not None:
            ended(attempt)
    best = best_attempt(study.attempts)
    made = recipe_of(recipe, dimensions, best)
    names = tuple(task.name for task in scores.tasks)
    return Found(study.attempts, best, made, names, split, settings, tuple(dimensions))


def _first(values: Values) -> Any:
    return values.values[0] if isinstance(values, Choices) else values.number(values.low)


def _tried(
    trial: Trial,
    recipe: Recipe,
    dimensions: Sequence[Dimension],
    earlier: Sequence[Attempt],
    scores: Scores,
    split: str,
    make: Make,
    settings: Settings,
    tell: Callable[[str], None] | None,
) -> Attempt:
    started = perf_counter()
    tasks: dict[str, float] = {}
    with make(placed(recipe, dimensions, trial.values), trial.label) as candidate:
        try:
            _ = candidate.plan
        except MergebenchError as error:
            return trial.end("refused", {}, perf_counter() - started, str(error))
        for step, task in enumerate(scores.tasks):
            found = scores.one(task, candidate, split, tell)
            if found.value is None:
                return trial.end("failed", tasks, perf_counter() - started, found.problem)
            tasks[task.name] = found.value
            trial.report(fsum(tasks.values()) / len(tasks), step)
            left = [each.name for each in scores.tasks[step + 1 :]]
            if left and _given_up(trial, tasks, left, earlier, settings.prune):
                return trial.end("pruned", tasks, perf_counter() - started, "")
    return trial.end("done", tasks, perf_counter() - started, "")


def _given_up(
    trial: Trial,
    tasks: dict[str, float],
    left: Sequence[str],
    earlier: Sequence[Attempt],
    prune: Prune,
) -> bool:
    finished = [each.value for each in earlier if each.value is not None]
    if prune == "none" or len(finished) < STARTUP:
        return False
    if prune == "median":
        return trial.is_below_median()
    tops = [max(each.tasks[name] for each in earlier if name in each.tasks) for name in left]
    hoped = fsum([*tasks.values(), *tops]) / (len(tasks) + len(left))
    return hoped <= max(finished)


def _exhausted(attempts: Sequence[Attempt], settings: Settings) -> bool:
    if not settings.patience or not any(each.value is not None for each in attempts):
        return False
    return len(attempts) - 1 - best_attempt(attempts).number >= settings.patience


def best_attempt(attempts: Sequence[Attempt]) -> Attempt:
    """The attempt of the highest value; the first among equals.

    Raises
    ------
    ParameterError
        If none has one.
    """
    scored = [each for each in attempts if each.value is not None]
    if not scored:
        why = next((each.problem for each in attempts if each.problem), "nothing was tried")
        raise ParameterError("no trial has a score", got=why)
    return max(scored, key=lambda each: each.value or 0.0)


def recipe_of(recipe: Recipe, dimensions: Sequence[Dimension], attempt: Attempt) -> Recipe:
    """The recipe with what was tried."""
    return placed(recipe, dimensions, [attempt.values[each.name] for each in dimensions])


def defaults(recipe: Recipe, dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """What method and ops would take for each dimension by themselves."""
    found: dict[str, Any] = {}
    for each in dimensions:
        owner, known = declared_params(recipe, each.place)
        preset = {}
        if each.place < 0 and recipe.compat is not None and recipe.method:
            preset = dict(METHODS[recipe.method].compat.get(recipe.compat, {}))
        param = known[each.key]
        value = preset.get(each.key, None if param.required else param.default)
        if value is not None:
            found[each.name] = bind(owner, {each.key: param}, {each.key: value})[each.key]
    return found
