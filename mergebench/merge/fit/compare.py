"""Methods beside each other on the same models and tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from typing import Any

from mergebench.core.errors import MergebenchError
from mergebench.merge.fit.candidate import only
from mergebench.merge.fit.grid import best_of, grid
from mergebench.merge.fit.scores import Outcome, Scores
from mergebench.merge.fit.soups import Make
from mergebench.merge.method import METHODS
from mergebench.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """One line of the comparison, before it is measured.

    Attributes
    ----------
    title : str
    recipe : Recipe
        With lists of values to choose from on the selection split.
    """

    title: str
    recipe: Recipe


@dataclass(frozen=True)
class Line:
    """One line of the comparison.

    Attributes
    ----------
    title, role : str
        ``role`` is ``base``, ``expert`` or ``merge``.
    chosen : str
        The values chosen on the selection split, if there was a choice.
    recipe : Recipe
    outcomes : tuple of Outcome
        On the report split, one per task.
    seconds : float
        Merging and selection; scoring on the report split apart.
    trials : int
    problem : str
        Why there is nothing, where a method cannot merge these models.
    """

    title: str
    role: str
    recipe: Recipe
    outcomes: tuple[Outcome, ...] = ()
    chosen: str = ""
    seconds: float = 0.0
    trials: int = 1
    problem: str = ""

    @property
    def values(self) -> dict[str, float]:
        """Task -> value on the report split, more always better."""
        return {each.task: each.value for each in self.outcomes if each.value is not None}


@dataclass(frozen=True)
class Comparison:
    """All lines, and what values are divided by to be normalised.

    Attributes
    ----------
    tasks : tuple of str
    lines : tuple of Line
    best : mapping of task to value
        Of the best expert on it, where that is positive.
    """

    tasks: tuple[str, ...]
    lines: tuple[Line, ...]
    best: Mapping[str, float] = field(default_factory=dict)

    def average(self, line: Line) -> float | None:
        """Mean over the tasks; ``None`` where one has no value."""
        values = [line.values.get(task) for task in self.tasks]
        return None if None in values else fsum(v for v in values if v is not None) / len(values)

    def normalised(self, line: Line) -> float | None:
        """Mean over the tasks of value / value of the best expert."""
        if set(self.best) != set(self.tasks) or set(line.values) != set(self.tasks):
            return None
        shares = [line.values[task] / self.best[task] for task in self.tasks]
        return fsum(shares) / len(shares)


def compare(
    entries: Sequence[Entry],
    models: Recipe,
    scores: Scores,
    *,
    select: str,
    report: str,
    make: Make,
    tell: Callable[[str], None] | None = None,
    clock: Callable[[], float],
) -> Comparison:
    """Measure base, single models and every entry.

    Values of an entry's parameters are chosen on ``select``; all that is shown was measured on
    ``report``.

    Parameters
    ----------
    entries : sequence of Entry
    models : Recipe
        Its models and base are measured by themselves.
    scores, make, tell
        As for :func:`~mergebench.merge.fit.soups.greedy_soup`.
    select, report : str
        Splits.
    clock : callable
        Seconds since some moment.

    Raises
    ------
    ScorerError
        As :meth:`~mergebench.merge.fit.scores.Scores.of`.
    """

    def measured(recipe: Recipe, title: str, role: str, **about: Any) -> Line:
        with make(recipe, title) as candidate:
            outcomes = tuple(scores.of(candidate, report, tell))
        return Line(title, role, recipe, outcomes, **about)

    lines = []
    if models.base is not None:
        lines.append(measured(only(models.base), "base", "base"))
    lines += [
        measured(only(model.path, models.base), model.path, "expert") for model in models.models
    ]
    for entry in entries:
        started = clock()
        try:
            if any(isinstance(value, (list, tuple)) for value in entry.recipe.params.values()):
                trials = grid(entry.recipe, scores, select, make, tell)
                best = best_of(trials)
                recipe, label, count = best.recipe, best.label, len(trials)
            else:
                recipe, label, count = entry.recipe, "", 1
            # Planned here, so that what a method refuses is told of the method.
            _ = make(recipe, entry.title).plan
        except MergebenchError as error:
            if scores.on_error == "stop":
                raise
            lines.append(Line(entry.title, "merge", entry.recipe, problem=str(error)))
            continue
        spent = clock() - started
        lines.append(
            measured(recipe, entry.title, "merge", chosen=label, seconds=spent, trials=count)
        )
    experts = [line.values for line in lines if line.role == "expert"]
    names = tuple(task.name for task in scores.tasks)
    tops = {
        name: max(each[name] for each in experts)
        for name in names
        if all(name in each for each in experts)
    }
    return Comparison(names, tuple(lines), {k: v for k, v in tops.items() if v > 0})


def entry_of(text: str, models: Recipe) -> Entry:
    """``METHOD[:K=V/V,...][+OP[:K=V,...]]`` as a line: ``ties:density=0.1/0.2,lam=1+lines``.

    Raises
    ------
    ParameterError
        For an unknown method or op, or values that it does not take.
    """
    from mergebench.recipe import parse_op

    first, *ops = text.split("+")
    method = parse_op(first)
    params = {
        key: tuple(value.split("/")) if isinstance(value, str) and "/" in value else value
        for key, value in method.params.items()
    }
    declared = METHODS[method.name]
    based = models.base if declared.space != "weight" or ops else None
    recipe = replace(
        models, method=method.name, params=params, base=based, then=tuple(map(parse_op, ops))
    )
    return Entry(text, recipe)
