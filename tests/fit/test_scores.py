"""What scorers may do, and what is made of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.merge.fit.find import Setting, parse_task
from mergebench.merge.fit.grid import best_of, grid
from mergebench.merge.fit.scores import ScorerError, Scores
from mergebench.merge.fit.task import Task
from tests.fit.support import Scored, make, recipe_of, save_model, scores_of, task_file


def first(w: Any) -> dict[str, float]:
    """The first entry."""
    return {"w": float(w[0])}


def test_scores_are_kept(tmp_path: Path) -> None:
    """By what decides the bytes of the model, by task and by split; damaged lines are passed."""
    place = save_model(tmp_path / "a", [0.5])
    kept = tmp_path / "cache" / "scores.jsonl"
    scorer = Scored(first)
    for turn in range(2):
        scores = Scores([Task("t", scorer, "spec")], kept=kept)
        with make(recipe_of(place), "a") as candidate:
            (found,) = scores.of(candidate, "val")
        assert (found.scores, found.kept) == ({"w": 0.5}, turn == 1)
        kept.write_text(kept.read_text() + "{cut\n" + '{"key": 1}\n')
    assert scorer.calls == ["a val"]
    scores = Scores([Task("t", scorer, "spec")], kept=kept)
    with make(recipe_of(place), "a") as candidate:
        scores.of(candidate, "test")
    other = Scores([Task("t", scorer, "another spec")], kept=kept)
    with make(recipe_of(place), "a") as candidate:
        other.of(candidate, "val")
    save_model(tmp_path / "a", [0.75])
    with make(recipe_of(place), "a") as candidate:
        (found,) = Scores([Task("t", scorer, "spec")], kept=kept).of(candidate, "val")
    assert found.scores == {"w": 0.75}
    assert scorer.calls == ["a val", "a test", "a val", "a val"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (float("nan"), "w is not finite"),
        (float("inf"), "w is not finite"),
        ("many", "w is no number"),
        (None, "w is no number"),
    ],
)
def test_what_is_no_score(tmp_path: Path, answer: Any, words: str) -> None:
    """Stops with the name of task, metric and candidate, or counts as no score."""
    place = save_model(tmp_path / "a", [0.5])
    with make(recipe_of(place), "model a") as candidate:
        with pytest.raises(ScorerError, match=f"task t: {words}.* on model a.*--on-error skip"):
            scores_of(lambda w: {"w": answer}).of(candidate, "val")
        (found,) = scores_of(lambda w: {"w": answer}, on_error="skip").of(candidate, "val")
    assert (found.scores, found.value) == ({}, None)
    assert words in found.problem


def test_a_scorer_that_hangs(tmp_path: Path) -> None:
    """Is stopped when its time is over."""
    place = save_model(tmp_path / "a", [0.5])

    def hang(w: Any) -> dict[str, float]:
        time.sleep(60)
        return first(w)

    with make(recipe_of(place), "a") as candidate:
        started = time.monotonic()
        (found,) = scores_of(hang, timeout=0.2, on_error="skip").of(candidate, "val")
    assert "took longer than 0.2 s" in found.problem
    assert time.monotonic() - started < 30


def test_less_may_be_better(tmp_path: Path) -> None:
    """Of a loss by its name, of what a scorer says, and the metric it names counts."""
    place = save_model(tmp_path / "a", [0.5])
    cases: list[tuple[dict[str, Any], dict[str, float], float]] = [
        ({}, {"loss": 2.0, "accuracy": 0.5}, -2.0),
        ({}, {"accuracy": 0.5, "loss": 2.0}, 0.5),
        ({"metric": "accuracy"}, {"loss": 2.0, "accuracy": 0.5}, 0.5),
        ({"lower_is_better": ("steps",)}, {"steps": 3.0}, -3.0),
    ]
    for about, answer, expected in cases:
        task = Task("t", Scored(lambda w, answer=answer: answer, **about), "t")
        with make(recipe_of(place), "a") as candidate:
            (found,) = Scores([task]).of(candidate, "val")
        assert found.value == expected
    with pytest.raises(MergebenchError, match="task t: has no metric 'f1'"):
        Task("t", Scored(first, metric="f1"), "t").value({"accuracy": 1.0})


def test_tasks_have_names_of_their_own() -> None:
    """One or more."""
    for tasks in ([], [Task("t", Scored(first), "a"), Task("t", Scored(first), "b")]):
        with pytest.raises(ParameterError, match="each with a name of its own"):
            Scores(tasks)


def test_grid(tmp_path: Path) -> None:
    """Every combination, in the order given; the best is the first of equals."""
    base, tuned = save_model(tmp_path / "base", [0.0]), save_model(tmp_path / "a", [1.0])
    recipe = recipe_of(
        tuned, method="task_arithmetic", base=str(base), params={"lam": ("0.5", "2", "1.5")}
    )
    scores = scores_of(lambda w: {"near": -abs(float(w[0]) - 1.75)})
    trials = grid(recipe, scores, "val", make)
    assert [each.label for each in trials] == ["lam=0.5", "lam=2", "lam=1.5"]
    assert [each.value for each in trials] == [-1.25, -0.25, -0.25]
    assert best_of(trials).label == "lam=2"
    wrong = recipe_of(tuned, method="ties", base=str(base), params={"density": ("0.5", "7")})
    counted = Scored(first)
    with pytest.raises(ParameterError, match="density"):
        grid(wrong, Scores([Task("t", counted, "t")]), "val", make)
    assert counted.calls == []


def test_commands(tmp_path: Path) -> None:
    """The whole output or its last JSON line; paths are one word whatever they hold."""
    place = save_model(tmp_path / "a b", [0.5])
    (place / "config.json").write_text("{}")
    script = tmp_path / "score.py"
    script.write_text(
        "import json, sys, safetensors.numpy as s\n"
        "w = s.load_file(sys.argv[1] + '/model.safetensors')['w']\n"
        "print('loading')\n"
        "print(json.dumps({'w': float(w[0]), 'split ' + sys.argv[2]: 1}))\n"
        "print('done')\n"
    )
    import sys

    spec = f"mine={sys.executable} {script} {{path}} {{split}}"
    task = parse_task(spec, Setting())
    assert task.name == "mine"
    with make(recipe_of(place), "a") as candidate:
        assert Scores([task]).of(candidate, "val")[0].scores == {"w": 0.5, "split val": 1.0}
    for text, words in (
        ("raise SystemExit('oh no')", "exit code 1.*oh no"),
        ("print('no json')", "printed no JSON object.*no json"),
        ("import time; time.sleep(60)", "took longer than 0.5 s"),
    ):
        script.write_text(text)
        failing = parse_task(spec, Setting(timeout=0.5 if "sleep" in text else None))
        with (
            make(recipe_of(place), "a") as candidate,
            pytest.raises(ScorerError, match=words),
        ):
            Scores([failing]).of(candidate, "val")
    missing = parse_task("no-such-program {path}", Setting())
    with (
        make(recipe_of(place), "a") as candidate,
        pytest.raises(ScorerError, match="cannot be run"),
    ):
        Scores([missing]).of(candidate, "val")


@pytest.mark.parametrize("ends", ["timeout", "interrupt"])
def test_a_command_that_hangs_leaves_nothing_behind(tmp_path: Path, ends: str) -> None:
    """Its children are ended with it, also where it is a shell that waits for them."""
    place = save_model(tmp_path / "a", [0.5])
    (place / "config.json").write_text("{}")
    mark = tmp_path / "mark"
    # The child holds the pipes; a parent that is killed alone leaves it to run and to write.
    script = f"(sleep 1; touch {mark}) & echo $! > {tmp_path}/child; wait; echo {{path}}"
    task = parse_task(f"t=sh -c {shlex.quote(script)}", Setting(timeout=0.3))
    started = time.monotonic()
    with make(recipe_of(place), "a") as candidate:
        if ends == "timeout":
            (found,) = Scores([task], on_error="skip").of(candidate, "val")
            assert "took longer than 0.3 s" in found.problem
        else:
            slow = parse_task(f"t=sh -c {shlex.quote(script)}", Setting())
            with pytest.raises(KeyboardInterrupt), interrupted_after(0.3):
                Scores([slow], on_error="skip").of(candidate, "val")
    assert time.monotonic() - started < 30
    child = int((tmp_path / "child").read_text())
    assert_gone(child)
    assert not mark.exists()


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C after a while."""
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    # Tests that a shell has started in the background would not hear it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def assert_gone(process: int) -> None:
    """No process has the number, but for what nobody has waited for."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    pytest.fail(f"process {process} is still there: {state}")


def test_specs(tmp_path: Path) -> None:
    """Files and modules by factory; what is none of the known forms lists them."""
    path = task_file(tmp_path / "near.py", [1.0, 2.0])
    assert parse_task(str(path), Setting()).name == "near"
    task = parse_task(f"x={path}:Near", Setting())
    assert task.name == "x"
    np.testing.assert_array_equal(task.scorer.target, [[1.0, 2.0]])
    before = parse_task(str(path), Setting()).spec
    task_file(path, [1.0, 3.0])
    assert parse_task(str(path), Setting()).spec != before
    for spec, words in (
        ("nonsense", "is no task.*classify:…, lm_eval:…, perplexity:…"),
        (f"{tmp_path}/none.py", "cannot be read"),
        (f"{path}:none", "could not be made.*AttributeError"),
        ("json:JSONDecoder", "has no method `score"),
        ("no_such_module_at_all:task", "could not be made.*ModuleNotFoundError"),
        ("classify:data.json", "needs the folder of the base"),
        (f"perplexity:{tmp_path}/none.txt", "has no text"),
        ("'{path}", "is no command"),
    ):
        with pytest.raises(MergebenchError, match=words):
            parse_task(spec, Setting())


def test_scores_of_changed_code_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module that is named, that of its factory, that of the class, and what a task says."""
    folder = tmp_path / "a_package_of_tasks"
    folder.mkdir()
    sources = {
        "__init__": "from .made import task\n",
        "made": "from .kinds import Kind\n\n\ndef task():\n    return Kind()\n",
        "kinds": "from .data import ROWS\n\n\nclass Kind:\n    identity = 'first rows'\n\n"
        "    def score(self, model, split):\n        return {'x': ROWS}\n",
        "data": "ROWS = 1.0\n",
    }
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text)
    (tmp_path / "lone.py").write_text("from a_package_of_tasks.kinds import Kind as task\n")
    monkeypatch.syspath_prepend(tmp_path)
    model, kept = save_model(tmp_path / "model", [0.5]), tmp_path / "scores.jsonl"

    def is_kept(spec: str) -> bool:
        with make(recipe_of(model), "model") as candidate:
            (found,) = Scores([parse_task(spec, Setting())], kept=kept).of(candidate, "val")
        return found.kept

    module, file = "a_package_of_tasks:task", str(tmp_path / "lone.py")
    for spec, files in ((module, ("__init__", "made", "kinds")), (file, ("../lone", "kinds"))):
        assert [is_kept(spec), is_kept(spec)] == [False, True]
        for name in files:
            place = folder / f"{name}.py"
            place.write_text(f"{place.read_text()}# changed\n")
            assert [is_kept(spec), is_kept(spec)] == [False, True], (spec, name)
        # What is imported from elsewhere is not looked at, but for what the task says of it.
        (folder / "data.py").write_text("ROWS = 2.0\n")
        assert is_kept(spec)
    kind = sys.modules["a_package_of_tasks.kinds"].Kind
    monkeypatch.setattr(kind, "identity", "other rows")
    assert not is_kept(module)


def test_the_file_that_is_read_is_the_one_that_runs(tmp_path: Path) -> None:
    """Not what Python keeps of one with as many characters, written within the same second."""
    model = save_model(tmp_path / "model", [0.5])
    path, kept = tmp_path / "eval.py", tmp_path / "scores.jsonl"
    for number in (1, 2):
        path.write_text(
            "class T:\n    def score(self, model, split):\n"
            f"        return {{'x': {number}}}\n\n\ntask = T\n"
        )
        os.utime(path, (1e9, 1e9))
        with make(recipe_of(model), "model") as candidate:
            task = parse_task(str(path), Setting())
            (found,) = Scores([task], kept=kept).of(candidate, "val")
        assert found.scores == {"x": number}
    assert not (tmp_path / "__pycache__").exists()


def test_kept_scores_are_json_lines(tmp_path: Path) -> None:
    """One to a line, so that they can be read by anything."""
    place, kept = save_model(tmp_path / "a", [0.5]), tmp_path / "scores.jsonl"
    with make(recipe_of(place), "a") as candidate:
        Scores([Task("t", Scored(first), "spec")], kept=kept).of(candidate, "val")
        (line,) = kept.read_text().splitlines()
        data = json.loads(line)
        assert data["key"] == f"{candidate.key} val spec"
        assert data["scores"] == {"w": 0.5}
