"""A search that can be interrupted: what was tried is on disk before the next trial begins."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from warnings import catch_warnings, simplefilter

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.schedule import Gradient
from mergebench.merge.fit.ranges import Choices, Range
from mergebench.merge.fit.space import Dimension, labelled
from mergebench.packages import install_line

State = Literal["done", "pruned", "failed", "refused"]
Sampler = Literal["tpe", "random"]
#: Trials that are drawn without looking at earlier ones, and that are never given up early.
STARTUP = 10
#: The largest seed that Optuna takes, and a prime far from powers of 2.
_SEEDS, _PRIME = 2**32, 2_654_435_761
_STUDY = "mergebench"
#: As Optuna knows them. What has no score counts as the worst there is: failures of Optuna's are
#: not looked at, and values that break a model would be drawn again and again.
_STATES = {"done": "COMPLETE", "pruned": "PRUNED", "failed": "PRUNED", "refused": "PRUNED"}


@dataclass(frozen=True)
class Attempt:
    """One set of values that was tried.

    Attributes
    ----------
    number : int
        From 0, in the order of trials.
    label : str
        Such as ``density=0.2,lam=0.7``.
    values : mapping of dimension to value
        Plain: a gradient is its text.
    state : done, pruned, failed or refused
        ``pruned``: given up after some of the tasks; ``failed``: a scorer has; ``refused``: the
        method does not take these values together.
    tasks : mapping of task to value
        More always better; of a trial that was given up, those that it got to.
    seconds : float
        Merging and scoring.
    problem : str
    """

    number: int
    label: str
    values: Mapping[str, Any]
    state: State
    tasks: Mapping[str, float]
    seconds: float = 0.0
    problem: str = ""

    @property
    def value(self) -> float | None:
        """Mean over the tasks; ``None`` where some are missing."""
        if self.state != "done":
            return None
        return sum(self.tasks.values()) / len(self.tasks)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "number": self.number, "label": self.label, "values": dict(self.values),
            "state": self.state, "value": self.value, "tasks": dict(self.tasks),
            "seconds": self.seconds, "problem": self.problem,
        }  # fmt: skip


class Study:
    """Trials in a journal.

    Parameters
    ----------
    file : Path or None
        Of the journal; in memory without one.
    about : mapping of text to text
        What the study is of. A journal that says otherwise is refused.
    dimensions : sequence of Dimension
    sampler : tpe or random
    seed : int
        A trial depends on it, on its number and on the trials before it: an interrupted search
        that goes on tries what it would have tried.

    Raises
    ------
    ParameterError
        If the file is of another study, or is none.
    MergebenchError
        If Optuna is not installed.
    """

    def __init__(
        self,
        file: Path | None,
        about: Mapping[str, str],
        dimensions: Sequence[Dimension],
        sampler: Sampler = "tpe",
        seed: int = 0,
    ) -> None:
        if find_spec("optuna") is None:
            raise MergebenchError("a search needs optuna", fix=f"run {install_line('search')}")
        self._dimensions, self._sampler, self._seed = tuple(dimensions), sampler, seed
        self._study = _opened(file, dict(about))
        self._attempts: list[Attempt] = []
        for trial in self._study.get_trials(deepcopy=False):
            about = trial.user_attrs.get(_STUDY)
            if about is not None:
                self._attempts.append(_attempt(len(self._attempts), about))
            if trial.state.name == "RUNNING":
                # Its process was killed.
                value = None if about is None else self._attempts[-1].value
                self.tell(trial.number, "FAIL" if about is None else about["state"], value)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """What was tried, by this run and by those before it."""
        return tuple(self._attempts)

    def ask(self, start: Mapping[str, Any]) -> Trial:
        """The next values to try; those of ``start`` come first."""
        import optuna

        number = len(self._attempts)
        if number == 0:
            with catch_warnings():
                simplefilter("ignore")
                self._study.enqueue_trial(_flat(self._dimensions, start))
        seed = (self._seed * _PRIME + number) % _SEEDS
        self._study.sampler = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
            if self._sampler == "tpe"
            else optuna.samplers.RandomSampler(seed=seed)
        )
        self._study.pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
        return Trial(self._study.ask(), self, number, self._dimensions)

    def tell(self, trial: Any, state: str, value: float | None = None) -> None:
        """Say what has become of a trial of Optuna's, by itself or by its number."""
        import optuna

        with catch_warnings():
            simplefilter("ignore")
            found = optuna.trial.TrialState[_STATES.get(state, state)]
            self._study.tell(trial, value, state=found)

    def add(self, attempt: Attempt) -> None:
        """Count what has been tried."""
        self._attempts.append(attempt)


class Trial:
    """Values that are being tried; ends with one of :meth:`end` and :meth:`drop`.

    Attributes
    ----------
    number : int
    values : list
        One for each dimension.
    label : str
    """

    def __init__(
        self, trial: Any, study: Study, number: int, dimensions: Sequence[Dimension]
    ) -> None:
        self._trial, self._study, self.number = trial, study, number
        self._names = [each.name for each in dimensions]
        self.values = [_suggested(trial, each) for each in dimensions]
        self.label = labelled(dimensions, self.values)

    def report(self, mean: float, step: int) -> None:
        """The mean over the first ``step + 1`` tasks."""
        self._trial.report(mean, step)

    def is_below_median(self) -> bool:
        """Whether the median of earlier trials was better after as many tasks."""
        return bool(self._trial.should_prune())

    def end(
        self, state: State, tasks: Mapping[str, float], seconds: float, problem: str
    ) -> Attempt:
        """Keep what came of it."""
        plain = [str(each) if isinstance(each, Gradient) else each for each in self.values]
        about = {
            "label": self.label, "values": dict(zip(self._names, plain, strict=True)),
            "state": state, "tasks": dict(tasks), "seconds": round(seconds, 3), "problem": problem,
        }  # fmt: skip
        # In one piece, before the state that makes it count.
        self._trial.set_user_attr(_STUDY, about)
        made = _attempt(self.number, about)
        self._study.tell(self._trial, state, made.value)
        self._study.add(made)
        return made

    def drop(self) -> None:
        """Forget it: the next trial has the same values."""
        self._study.tell(self._trial, "FAIL")


def _attempt(number: int, about: Mapping[str, Any]) -> Attempt:
    return Attempt(
        number, str(about["label"]), about["values"], about["state"], about["tasks"],
        float(about["seconds"]), str(about["problem"]),
    )  # fmt: skip


def _opened(file: Path | None, about: dict[str, str]) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage: Any = None
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if file is not None:
            _mend(file)
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
        # Asked for, since making one that exists writes before it says so.
        if storage is not None and _STUDY in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=_STUDY, storage=storage)
        else:
            study = optuna.create_study(storage=storage, study_name=_STUDY, direction="maximize")
    finally:
        optuna.logging.set_verbosity(level)
    known = study.user_attrs.get(_STUDY)
    if known is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(_STUDY, about)
        return study
    others = [key for key in about if (known or {}).get(key) != about[key]]
    if others:
        raise ParameterError(
            f"{file}: is a study of something else",
            got=f"other {', '.join(others)}",
            fix="give another --study, or remove it to begin anew",
        )
    return study


def _mend(file: Path) -> None:
    """Cut a line that a killed run has begun: the next one would be added to it.

    Raises
    ------
    ParameterError
        If it is no journal.
    """
    if not file.is_file():
        return
    raw = file.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    for line in whole.splitlines():
        found = None
        with suppress(ValueError):
            found = json.loads(line)
        if not isinstance(found, dict) or "op_code" not in found:
            raise ParameterError(f"{file}: is no study", fix="give another --study")
    if not whole and raw:
        raise ParameterError(f"{file}: is no study", fix="give another --study")
    if whole != raw:
        with file.open("r+b") as stream:
            stream.truncate(len(whole))


def _suggested(trial: Any, dimension: Dimension) -> Any:
    values, name = dimension.values, dimension.name
    if isinstance(values, Choices):
        return values.values[trial.suggest_categorical(name, list(range(len(values.values))))]
    if values.anchors:
        parts = [_number(trial, f"{name}[{place}]", values) for place in range(values.anchors)]
        return Gradient(tuple(parts))
    return _number(trial, name, values)


def _number(trial: Any, name: str, values: Range) -> Any:
    if values.whole:
        step = 1 if values.step is None or values.log else int(values.step)
        return trial.suggest_int(name, int(values.low), int(values.high), step=step, log=values.log)
    found = trial.suggest_float(name, values.low, values.high, step=values.step, log=values.log)
    return values.number(found)


def _flat(dimensions: Sequence[Dimension], start: Mapping[str, Any]) -> dict[str, Any]:
    """Values as Optuna names them, of those dimensions that can have theirs."""
    found: dict[str, Any] = {}
    for each in dimensions:
        value, values = start.get(each.name), each.values
        if value is None:
            continue
        if isinstance(values, Choices):
            if value in values.values:
                found[each.name] = values.values.index(value)
            continue
        if not isinstance(value, (int, float)) or not values.low <= value <= values.high:
            continue
        if values.step is not None and value not in values.grid:
            continue
        names = [f"{each.name}[{place}]" for place in range(values.anchors)] or [each.name]
        found |= dict.fromkeys(names, value)
    return found
