"""Methods beside each other on the same models and tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from typing import Any, Literal

from mergebench.core.errors import MergebenchError
from mergebench.core.version import own_version
from mergebench.merge.fit.candidate import Candidate, only
from mergebench.merge.fit.entries import Entry
from mergebench.merge.fit.grid import best_of, grid
from mergebench.merge.fit.scores import Outcome, Scores
from mergebench.merge.fit.soups import Make
from mergebench.recipe import Recipe

Role = Literal["base", "expert", "merge"]


@dataclass(frozen=True)
class Fitted:
    """What a fit has made.

    Attributes
    ----------
    recipe : Recipe
    chosen : str
    seconds : float
    trials : tuple of (label, value or None)
    """

    recipe: Recipe
    chosen: str = ""
    seconds: float = 0.0
    trials: tuple[tuple[str, float | None], ...] = ()


#: Makes a recipe of a fit's words.
Fit = Callable[[Entry], Fitted]


@dataclass(frozen=True)
class Cost:
    """What a line costs.

    Attributes
    ----------
    choosing : float
        Seconds of merging and scoring on the selection split, or of fitting.
    merging : float
        Seconds of the merge that is reported.
    scoring : float
        Seconds of scoring on the report split.
    read, written : int
        Bytes of that merge; ``read`` counts every pass.
    memory : int
        Least bytes that it needs beside the libraries.
    """

    choosing: float = 0.0
    merging: float = 0.0
    scoring: float = 0.0
    read: int = 0
    written: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Line:
    """One line of the comparison.

    Attributes
    ----------
    title : str
    role : base, expert or merge
    recipe : Recipe
    outcomes : tuple of Outcome
        On the report split, one per task.
    chosen : str
        The values chosen on the selection split, if there was a choice.
    trials : tuple of (label, value or None)
        What they were chosen from; more is always better.
    cost : Cost
    problem : str
        Why there is nothing, where a method cannot merge these models.
    """

    title: str
    role: Role
    recipe: Recipe
    outcomes: tuple[Outcome, ...] = ()
    chosen: str = ""
    trials: tuple[tuple[str, float | None], ...] = ()
    cost: Cost = field(default_factory=Cost)
    problem: str = ""

    @property
    def values(self) -> dict[str, float]:
        """Task -> value on the report split, more always better."""
        return {each.task: each.value for each in self.outcomes if each.value is not None}

    @property
    def problems(self) -> list[str]:
        """Why values are missing."""
        return [text for text in (self.problem, *(e.problem for e in self.outcomes)) if text]


@dataclass(frozen=True)
class Comparison:
    """All lines, and what they are measured against.

    Attributes
    ----------
    tasks, metrics : tuple of str
        Names of tasks, and the metric of each that counts (empty where nothing was scored).
    select, report : str
        Splits.
    lines : tuple of Line
    lower : frozenset of str
        Tasks of which less is better, as they are shown; values are negated.
    experts : mapping of task to title
        The model whose value on a task is 1 when values are normalised: the one whose name has
        the task's, if there is exactly one, else the best.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    select: str
    report: str
    lines: tuple[Line, ...]
    experts: Mapping[str, str]
    lower: frozenset[str] = frozenset()

    def average(self, line: Line) -> float | None:
        """Mean over the tasks, more always better, if all have a value."""
        return _mean([line.values.get(task) for task in self.tasks])

    def shares(self, line: Line) -> dict[str, float]:
        """Task -> value as a share of the task's expert's; more always better.

        Of metrics of which less is better it is the expert's over the line's.
        """
        own = {each.title: each.values for each in self.lines if each.role == "expert"}
        found = {}
        for task in self.tasks:
            top = own.get(self.experts.get(task, ""), {}).get(task)
            value = line.values.get(task)
            if top is not None and value is not None and value * top > 0:
                found[task] = value / top if top > 0 else top / value
        return found

    def normalised(self, line: Line) -> float | None:
        """Mean of the shares, if all tasks have one."""
        shares = self.shares(line)
        return _mean([shares.get(task) for task in self.tasks])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "mergebench": own_version(),
            "tasks": list(self.tasks),
            "metrics": list(self.metrics),
            "select": self.select,
            "report": self.report,
            "lower_is_better": [task for task in self.tasks if task in self.lower],
            "experts": dict(self.experts),
            "lines": [self._plain(each) for each in self.lines],
        }

    def _plain(self, line: Line) -> dict[str, Any]:
        cost = line.cost
        return {
            "model": line.title,
            "role": line.role,
            "chosen": line.chosen,
            "average": self.average(line),
            "normalised": self.normalised(line),
            "values": line.values,
            "shares": self.shares(line),
            "seconds": round(cost.choosing + cost.merging, 3),
            "cost": {
                "choosing": round(cost.choosing, 3), "merging": round(cost.merging, 3),
                "scoring": round(cost.scoring, 3), "read": cost.read, "written": cost.written,
                "memory": cost.memory,
            },
            "trials": max(len(line.trials), 1),
            "selection": [{"label": label, "value": value} for label, value in line.trials],
            "tasks": [each.to_json() for each in line.outcomes],
            "recipe": line.recipe.to_dict(),
            **({"problem": line.problem} if line.problem else {}),
        }  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return fsum(known) / len(known) if known and len(known) == len(values) else None


def compare(
    entries: Sequence[Entry],
    models: Recipe,
    scores: Scores,
    *,
    select: str,
    report: str,
    make: Make,
    fit: Fit | None = None,
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    """Measure base, single models and every entry.

    Values of an entry's parameters are chosen on ``select``; all that is shown was measured on
    ``report``. What was scored before is not scored again, so that an interrupted comparison goes
    on.

    Parameters
    ----------
    entries : sequence of Entry
    models : Recipe
        Its models and base are measured by themselves.
    scores, make, tell
        As for :func:`~mergebench.merge.fit.soups.greedy_soup`.
    select, report : str
        Splits.
    fit : callable, optional
        Runs the fits among the entries.

    Raises
    ------
    ScorerError
        As :meth:`~mergebench.merge.fit.scores.Scores.of`.
    MergebenchError
        Where a method refuses the models and ``scores.on_error`` is ``stop``.
    """

    def measured(recipe: Recipe, title: str, role: Role, made: Fitted | None = None) -> Line:
        with make(recipe, title) as candidate:
            outcomes = tuple(scores.of(candidate, report, tell))
            cost = _cost(candidate, outcomes, 0.0 if made is None else made.seconds)
        about = {} if made is None else {"chosen": made.chosen, "trials": made.trials}
        return Line(title, role, recipe, outcomes, cost=cost, **about)  # type: ignore[arg-type]

    lines = []
    if models.base is not None:
        lines.append(measured(only(models.base), "base", "base"))
    lines += [
        measured(only(model.path, models.base), model.path, "expert") for model in models.models
    ]
    for entry in entries:
        try:
            made = _made(entry, scores, select, make, fit, tell)
            # Planned here, so that what a method refuses is told of the method.
            _ = make(made.recipe, entry.title).plan
        except MergebenchError as error:
            if scores.on_error == "stop":
                raise
            lines.append(Line(entry.title, "merge", entry.recipe, problem=str(error)))
            continue
        lines.append(measured(made.recipe, entry.title, "merge", made))
    names = tuple(task.name for task in scores.tasks)
    metrics = []
    for task in scores.tasks:
        known = [o.scores for line in lines for o in line.outcomes if o.task == task.name]
        metrics.append(next((task.metric(each) for each in known if each), ""))
    lower = frozenset(
        task.name
        for task, metric in zip(scores.tasks, metrics, strict=True)
        if metric in task.lower_is_better
    )
    experts = _experts(lines, names)
    return Comparison(names, tuple(metrics), select, report, tuple(lines), experts, lower)


def _made(
    entry: Entry,
    scores: Scores,
    select: str,
    make: Make,
    fit: Fit | None,
    tell: Callable[[str], None] | None,
) -> Fitted:
    if entry.fit:
        if fit is None:
            raise MergebenchError(f"{entry.title}: fits cannot be run here")
        return fit(entry)
    trials = grid(entry.recipe, scores, select, make, tell, alone=False)
    if len(trials) == 1 and not trials[0].outcomes:
        return Fitted(trials[0].recipe)
    best = best_of(trials)
    seconds = sum(each.seconds for each in trials)
    return Fitted(
        best.recipe, best.label, seconds, tuple((each.label, each.value) for each in trials)
    )


def _cost(candidate: Candidate, outcomes: Sequence[Outcome], choosing: float) -> Cost:
    plan = candidate.plan
    return Cost(
        choosing=choosing,
        merging=sum(each.merging for each in outcomes),
        scoring=sum(each.seconds for each in outcomes),
        read=plan.read_bytes * plan.passes,
        written=plan.write_bytes,
        memory=plan.least_memory,
    )


def _experts(lines: Sequence[Line], tasks: Sequence[str]) -> dict[str, str]:
    experts = [line for line in lines if line.role == "expert"]
    found = {}
    for task in tasks:
        named = [each for each in experts if task in _words(each.title)]
        scored = [each for each in experts if task in each.values]
        if len(named) == 1:
            found[task] = named[0].title
        elif scored:
            found[task] = max(scored, key=lambda each: each.values[task]).title
    return found


def _words(title: str) -> set[str]:
    """Names on the way to a model, without an ending."""
    path = Path(title)
    return {*path.parts, path.stem}
