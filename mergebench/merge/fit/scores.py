"""Scores of candidates, kept so that nothing is measured twice."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from time import perf_counter
from typing import Any

from mergebench.core.cache_folder import cache_folder
from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.plain import parse_json
from mergebench.merge.fit.candidate import Candidate
from mergebench.merge.fit.task import Task, checked

#: Longest line of kept scores that is read, in bytes.
_LONGEST = 1 << 16


def default_file() -> Path:
    """Where the command line keeps scores: beside other things that can be made again."""
    return cache_folder() / "scores.jsonl"


class ScorerError(MergebenchError):
    """A scorer crashed, gave no numbers, or took too long."""


@dataclass(frozen=True)
class Outcome:
    """What one task said of one candidate.

    Attributes
    ----------
    task, split : str
    scores : mapping of metric to value
        Empty where there is a problem.
    value : float or None
        The metric that counts, more always better.
    problem : str
        Why there are no scores.
    seconds : float
        What measuring took, now or when it was kept, without merging.
    merging : float
        What merging took where this task was the first to ask for the model.
    kept : bool
        From an earlier run.
    """

    task: str
    split: str
    scores: dict[str, float] = field(default_factory=dict)
    value: float | None = None
    problem: str = ""
    seconds: float = 0.0
    kept: bool = False
    merging: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        about = {"problem": self.problem} if self.problem else {}
        return {"task": self.task, "split": self.split, "scores": self.scores,
                "seconds": round(self.seconds, 6), "merging": round(self.merging, 6),
                "kept": self.kept, **about}  # fmt: skip


def mean_value(outcomes: Sequence[Outcome]) -> float | None:
    """The mean over tasks; ``None`` if any has no score."""
    values = [each.value for each in outcomes]
    return None if None in values else fsum(v for v in values if v is not None) / len(values)


class Scores:
    """Scores of any candidate on given tasks.

    Parameters
    ----------
    tasks : sequence of Task
    kept : Path, optional
        A file of JSON lines to which scores are added; nothing is kept without one.
    timeout : float, optional
        Seconds that one scorer may take. Kept to on the main thread of POSIX systems, and by
        commands everywhere.
    on_error : stop or skip
        What a scorer's failure does: end the fit, or count as no score.

    Raises
    ------
    ParameterError
        For no tasks, or two of one name.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        kept: Path | None = None,
        timeout: float | None = None,
        on_error: str = "stop",
    ) -> None:
        names = [task.name for task in tasks]
        if not tasks or len(set(names)) < len(names):
            raise ParameterError(
                "tasks: one or more, each with a name of its own",
                got=", ".join(names) or "none",
                fix="--task NAME=SPEC",
            )
        self.tasks, self.timeout, self.on_error = tuple(tasks), timeout, on_error
        self._file = kept
        self._known = dict(_read(kept)) if kept is not None else {}

    def of(
        self, candidate: Candidate, split: str, tell: Callable[[str], None] | None = None
    ) -> list[Outcome]:
        """What every task says of a candidate on a split, in the order of the tasks.

        Raises
        ------
        ScorerError
            If a scorer fails and ``on_error`` is ``stop``. What others have said is kept.
        """
        return [self.one(task, candidate, split, tell) for task in self.tasks]

    def one(
        self,
        task: Task,
        candidate: Candidate,
        split: str,
        tell: Callable[[str], None] | None = None,
    ) -> Outcome:
        """What one of the tasks says.

        Raises
        ------
        ScorerError
            As :meth:`of`.
        """
        key = f"{candidate.key} {split} {task.spec}"
        if (known := self._known.get(key)) is not None:
            return _outcome(task, split, *known, kept=True)
        if tell is not None:
            tell(f"{task.name} on {candidate.label}")
        started, before = perf_counter(), _merging(candidate)
        try:
            with limited(self.timeout, task.name):
                scores = checked(task.scorer.score(candidate, split), task.name)
        except MergebenchError as error:
            problem: Exception = error
        except Exception as error:
            # What a scorer does is its own; a crash of it must not lose what others found.
            problem = ScorerError(
                f"task {task.name}: the scorer failed", got=f"{type(error).__name__}: {error}"
            )
        else:
            merging = _merging(candidate) - before
            seconds = perf_counter() - started - merging
            # As they are kept, so that a later run says the same.
            measured = scores, round(seconds, 6), round(merging, 6)
            self._keep(key, *measured)
            return _outcome(task, split, *measured)
        if self.on_error == "stop":
            raise ScorerError(
                f"{problem}, on {candidate.label}",
                fix="mend the scorer and run again: what is scored is kept; or go on with "
                "--on-error skip",
            ) from problem
        seconds = perf_counter() - started
        return Outcome(task.name, split, problem=str(problem), seconds=seconds)

    def _keep(self, key: str, scores: dict[str, float], seconds: float, merging: float) -> None:
        self._known[key] = (scores, seconds, merging)
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        spent = {"seconds": seconds, "merging": merging}
        line = json.dumps({"key": key, "scores": scores, **spent})
        # One write of a whole line: two runs that add to one file do not mix theirs.
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _merging(candidate: Any) -> float:
    """Seconds of merging so far; what is no merge has none."""
    return float(getattr(candidate, "merging", 0.0))


def _outcome(
    task: Task,
    split: str,
    scores: dict[str, float],
    seconds: float,
    merging: float,
    kept: bool = False,
) -> Outcome:
    return Outcome(task.name, split, scores, task.value(scores), "", seconds, kept, merging)


def _read(path: Path) -> Iterator[tuple[str, tuple[dict[str, float], float, float]]]:
    """Kept scores; lines that are none, such as one cut off by a full disk, are passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if len(line) > _LONGEST:
                continue
            try:
                data: Any = parse_json(line)
                spent = float(data["seconds"]), float(data.get("merging", 0.0))
                yield str(data["key"]), (checked(data["scores"], "kept"), *spent)
            except (ValueError, KeyError, TypeError, MergebenchError):
                continue


@contextmanager
def limited(seconds: float | None, name: str) -> Iterator[None]:
    """Let what is done within take that long, where the system can tell it to stop.

    Raises
    ------
    ScorerError
        When the time is over.
    """
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise ScorerError(f"task {name}: took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
