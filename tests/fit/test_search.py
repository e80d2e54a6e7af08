"""Search: what is tried, kept, given up, resumed and refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.schedule import Gradient
from mergebench.merge.fit.scores import ScorerError, Scores
from mergebench.merge.fit.search import Found, Settings, search
from mergebench.merge.fit.space import fixed_and_free
from mergebench.merge.fit.study import STARTUP
from mergebench.merge.fit.task import Task
from mergebench.recipe import Recipe
from mergebench.steps import parse_op
from tests.fit.support import Scored, make, recipe_of, save_model
from tests.helpers.files import write

Answer = Callable[[Any], Mapping[str, float]]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A base at 0 and a model whose ``w`` is λ (1, 2) after task arithmetic."""
    return save_model(tmp_path / "base", [0.0, 0.0]), save_model(tmp_path / "a", [1.0, 2.0])


def asked(models: tuple[Path, Path], **params: Any) -> Recipe:
    """Task arithmetic with ranges."""
    base, tuned = models
    return recipe_of(tuned, base=str(base), method="task_arithmetic", params=params)


def near(w: Any) -> dict[str, float]:
    """Best at λ = 0.7."""
    return {"near": -abs(float(w[0]) - 0.7)}


def tasks_of(*answers: Answer) -> list[Task]:
    """A task for each function of ``w``."""
    return [Task(f"t{n}", Scored(each), f"t{n}") for n, each in enumerate(answers)]


def run(
    recipe: Recipe, tasks: list[Task], file: Path | None = None, on_error: str = "stop",
    timeout: float | None = None, **settings: Any,
) -> Found:  # fmt: skip
    """Search without anything kept but the study."""
    plain, dimensions = fixed_and_free(recipe)
    scores = Scores(tasks, on_error=on_error, timeout=timeout)
    return search(plain, dimensions, scores, "val", make, Settings(**settings), file=file)


def labels(found: Found) -> list[str]:
    """What was tried, in order."""
    return [each.label for each in found.attempts]


def test_it_begins_with_the_default_and_ends_near_the_best(models: tuple[Path, Path]) -> None:
    """The same seed tries the same, another one something else; the model only looks."""
    recipe = asked(models, lam="0:2")
    found = run(recipe, tasks_of(near), trials=30)

    assert labels(found)[0] == "lam=1"
    assert len(set(labels(found)[:STARTUP])) == STARTUP
    assert found.attempts[0].value == pytest.approx(-0.3)
    assert found.best.value is not None
    assert found.best.value > -0.03
    assert found.recipe.params == {"lam": found.best.values["lam"]}
    assert found.best.tasks == {"t0": found.best.value}
    assert labels(run(recipe, tasks_of(near), trials=30)) == labels(found)
    assert labels(run(recipe, tasks_of(near), trials=2, seed=1))[1] != labels(found)[1]
    drawn = run(recipe, tasks_of(near), trials=30, sampler="random")
    late = [abs(each.values["lam"] - 0.7) for each in drawn.attempts[STARTUP:]]
    looked = [abs(each.values["lam"] - 0.7) for each in found.attempts[STARTUP:]]
    # What is drawn after looking at the first ones is nearer than what is drawn blindly.
    assert np.median(looked) < np.median(late) / 2


def test_ops_words_and_depth(tmp_path: Path) -> None:
    """A chain, a list of words, integers, a logarithm, and numbers at three places over depth."""
    base, tuned = tmp_path / "base", tmp_path / "a"
    for place, value in ((base, 0.0), (tuned, 1.0)):
        place.mkdir()
        names = [f"layers.{n}.w" for n in range(3)]
        write(place / "model.safetensors", dict.fromkeys(names, np.full(4, value, np.float32)))
    recipe = recipe_of(
        tuned, base=str(base), method="ties", then=(parse_op("scale:lam=0.5/1"),),
        params={"density": "0.01:1:log", "lam": "0:1:x3", "scope": ("row", "tensor")},
    )  # fmt: skip

    class Layers:
        def score(self, model: Any, split: str) -> dict[str, float]:
            first, _, last = (float(model.arrays()[f"layers.{n}.w"][0]) for n in range(3))
            return {"near": -abs(first - 0.2) - abs(last - 0.8)}

    found = run(recipe, [Task("t", Layers(), "t")], trials=40)

    best = found.recipe
    assert isinstance(best.params["lam"], str)
    made = run(recipe, [Task("t", Layers(), "t")], trials=3)
    assert [each.values["scope"] in ("row", "tensor") for each in made.attempts] == [True] * 3
    first, _, last = map(float, str(best.params["lam"]).split(".."))
    factor = best.then[0].params["lam"]
    assert factor in (0.5, 1.0)
    assert abs(first * factor - 0.2) + abs(last * factor - 0.8) == pytest.approx(
        -(found.best.value or 0.0), abs=1e-5
    )
    assert (found.best.value or -9.0) > -0.5
    # Plain values of a trial, from which the recipe is made again.
    assert isinstance(found.best.values["lam"], str)
    with make(best, "best") as candidate:
        assert candidate.plan.variants[0].stored.params["lam"] == Gradient(
            tuple(map(float, str(best.params["lam"]).split("..")))
        )


class Interrupting(Scored):
    """Interrupts, or fails, at its n-th call."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__(near)
        self.at, self.error = at, error

    def score(self, model: Any, split: str) -> Mapping[str, float]:
        found = super().score(model, split)
        if len(self.calls) == self.at:
            raise self.error
        return found


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("lost the data")])
@pytest.mark.parametrize("at", [1, 5, 14])
def test_going_on_tries_what_would_have_been_tried(
    tmp_path: Path, models: tuple[Path, Path], at: int, error: BaseException
) -> None:
    """Interrupted, or stopped by a scorer; no trial is lost, and none is made twice."""
    recipe, file = asked(models, lam="0:2"), tmp_path / "s.journal"
    whole = run(recipe, tasks_of(near), trials=16)
    broken = Interrupting(at, error)
    with pytest.raises((KeyboardInterrupt, ScorerError)):
        run(recipe, [Task("t0", broken, "t0")], file, trials=16)

    task = Task("t0", Scored(near), "t0")
    found = run(recipe, [task], file, trials=16)

    assert labels(found) == labels(whole)
    assert [each.value for each in found.attempts] == [each.value for each in whole.attempts]
    assert len(task.scorer.calls) == 16 - (at - 1)
    assert labels(run(recipe, tasks_of(near), file, trials=18))[:16] == labels(whole)


@pytest.mark.parametrize("cut", range(1, 400, 37))
def test_a_killed_search_goes_on(tmp_path: Path, models: tuple[Path, Path], cut: int) -> None:
    """Wherever the journal ends, in the middle of a line too."""
    recipe, file = asked(models, lam="0:2"), tmp_path / "s.journal"
    whole = run(recipe, tasks_of(near), file, trials=6)
    file.write_bytes(file.read_bytes()[:-cut])

    found = run(recipe, tasks_of(near), file, trials=6)

    assert labels(found) == labels(whole)
    assert found.best == whole.best or found.best.label == whole.best.label


def test_another_study_is_refused(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """Other ranges, models, tasks, split or seed; what is no journal; and it is left as it is."""
    file = tmp_path / "s.journal"
    run(asked(models, lam="0:2"), tasks_of(near), file, trials=2)
    before = file.read_bytes()
    base, _ = models
    other = save_model(tmp_path / "b", [1.0, 3.0])
    for recipe, tasks, settings, words in (
        (asked(models, lam="0:3"), tasks_of(near), {}, "other ranges"),
        (asked((base, other), lam="0:2"), tasks_of(near), {}, "other models or parameters"),
        (asked(models, lam="0:2"), tasks_of(near, near), {}, "other tasks"),
        (asked(models, lam="0:2"), tasks_of(near), {"seed": 1}, "other sampler or seed"),
    ):
        with pytest.raises(ParameterError, match=f"study of something else.*{words}"):
            run(recipe, tasks, file, trials=4, **settings)
    assert file.read_bytes() == before
    assert len(run(asked(models, lam="0:2"), tasks_of(near), file, trials=4).attempts) == 4
    for text in ("lam: 0.5\n", "{}\n", "[1]\n", "no end of a line"):
        file.write_text(text)
        with pytest.raises(ParameterError, match=r"s\.journal: is no study"):
            run(asked(models, lam="0:2"), tasks_of(near), file, trials=4)
        assert file.read_text() == text


@pytest.mark.parametrize("prune", ["hopeless", "median"])
def test_hopeless_trials_are_given_up(models: tuple[Path, Path], prune: str) -> None:
    """They cost one task instead of two, and the result is as good."""

    def second(w: Any) -> dict[str, float]:
        return {"near": -abs(float(w[1]) - 1.4)}

    recipe = asked(models, lam="0:2")
    whole = run(recipe, tasks_of(near, second), trials=40, prune="none")
    tasks = tasks_of(near, second)
    found = run(recipe, tasks, trials=40, prune=prune)

    states = [each.state for each in found.attempts]
    assert set(states[:STARTUP]) == {"done"}
    dropped = [each for each in found.attempts if each.state == "pruned"]
    assert len(dropped) > 5
    assert all(list(each.tasks) == ["t0"] and each.value is None for each in dropped)
    assert len(tasks[1].scorer.calls) == 40 - len(dropped)
    assert {each.state for each in whole.attempts} == {"done"}
    best = found.best.value or -9.0
    assert best == pytest.approx(whole.best.value, abs=0.05)
    if prune == "hopeless":
        tops = [max(each.tasks.get("t1", -9.0) for each in found.attempts[: at.number])
                for at in dropped]  # fmt: skip
        sofar = [max(each.value or -9.0 for each in found.attempts[: at.number] if each.value)
                 for at in dropped]  # fmt: skip
        for at, top, known in zip(dropped, tops, sofar, strict=True):
            assert (at.tasks["t0"] + top) / 2 <= known


def test_failing_trials(models: tuple[Path, Path]) -> None:
    """Crashes and NaN end a trial and not the search; they are told of."""

    def odd(w: Any) -> dict[str, float]:
        lam = float(w[0])
        if lam > 1.5:
            raise ValueError("too large")
        if lam == 1:
            return {"near": float("nan")}
        return near(w)

    recipe = asked(models, lam="0:2")
    found = run(recipe, tasks_of(odd), on_error="skip", trials=25)

    failed = [each for each in found.attempts if each.state == "failed"]
    said = " ".join(each.problem for each in failed)
    assert "ValueError: too large" in said
    assert "near is not finite" in said
    assert all(each.value is None for each in failed)
    assert len(found.attempts) == 25
    assert (found.best.value or -9.0) > -0.1

    def never(w: Any) -> dict[str, float]:
        raise ValueError("no data")

    with pytest.raises(ParameterError, match=r"no trial has a score.*no data"):
        run(recipe, tasks_of(never), on_error="skip", trials=3)


def test_a_trial_that_hangs(models: tuple[Path, Path]) -> None:
    """Is ended when its time is over, and the search goes on behind it."""

    def slow(w: Any) -> dict[str, float]:
        if float(w[0]) == 1.0:
            time.sleep(60)
        return near(w)

    started = time.monotonic()
    found = run(asked(models, lam="0:2"), tasks_of(slow), on_error="skip", timeout=0.3, trials=4)
    assert [each.state for each in found.attempts] == ["failed", "done", "done", "done"]
    assert "took longer than 0.3 s" in found.attempts[0].problem
    assert time.monotonic() - started < 30


def test_what_a_method_refuses(models: tuple[Path, Path]) -> None:
    """Values that do not go together are a trial without a score, not the end."""
    base, tuned = models
    recipe = recipe_of(
        tuned, base=str(base), method="della_linear",
        params={"density": "0.5:1", "epsilon": "0:0.5"},
    )  # fmt: skip
    found = run(recipe, tasks_of(near), trials=20)

    refused = [each for each in found.attempts if each.state == "refused"]
    done = [each for each in found.attempts if each.state == "done"]
    assert refused
    assert len(done) > len(refused)
    for each in found.attempts:
        upper = each.values["density"] + each.values["epsilon"]
        assert (each.state == "refused") == (upper > 1)
        assert ("must be probabilities" in each.problem) == (upper > 1)
    wrong = recipe_of(tuned, method="task_arithmetic", params={"lam": "0:1"})
    with pytest.raises(MergebenchError, match="base"):
        run(wrong, tasks_of(near), trials=3)


def test_patience(models: tuple[Path, Path]) -> None:
    """It ends after so many trials without a better one."""
    found = run(asked(models, lam="0:2"), tasks_of(near), trials=60, patience=6)

    assert len(found.attempts) < 60
    assert len(found.attempts) - 1 - found.best.number == 6
    flat = run(asked(models, lam="0:2"), tasks_of(lambda w: {"x": 1.0}), trials=60, patience=3)
    assert (len(flat.attempts), flat.best.number) == (4, 0)
