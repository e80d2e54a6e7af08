"""``fit search`` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.fit.support import save_model, task_file
from tests.helpers.files import read
from tests.helpers.running import START, Ran, assert_done, assert_refused, call

TARGET = [[1.5, 0.0], [0.25, 1.0]]
SEARCH = ("fit", "search", "one", "two", "-b", "base", "-m", "task_arithmetic")


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A base, two models that move it apart, and a task between them: λ = 0.5."""
    save_model(tmp_path / "base", np.zeros((2, 2)))
    save_model(tmp_path / "one", [[3.0, 0.0], [0.0, 0.0]])
    save_model(tmp_path / "two", [[0.0, 0.0], [0.5, 2.0]])
    task_file(tmp_path / "near.py", TARGET)
    return tmp_path


def run(scene: Path, *args: str) -> Ran:
    """With a cache of its own."""
    return call(*args, cwd=scene, env={"XDG_CACHE_HOME": str(scene / "cache")})


def test_search(scene: Path) -> None:
    """The best becomes a recipe that `run` merges; the study goes on; everything is in the JSON."""
    args = (*SEARCH, "-p", "lam=0:2", "--task", "near.py", "-o", "best.yaml")
    ran = assert_done(run(scene, *args, "-n", "20", "--json"))

    trials = ran.json["val"]
    assert [each["number"] for each in trials] == list(range(20))
    assert trials[0]["label"] == "lam=1"
    best = max(trials, key=lambda each: each["value"])
    assert ran.json["chosen"] == best["label"]
    assert best["values"]["lam"] == pytest.approx(0.5, abs=0.1)
    stored = yaml.safe_load((scene / "best.yaml").read_text())
    assert stored["params"]["lam"] == best["values"]["lam"]
    assert ran.json["test"]["value"] == pytest.approx(best["value"])
    assert_done(run(scene, "run", "best.yaml", "-o", "out"))
    np.testing.assert_allclose(
        read(scene / "out")["w"], np.array(TARGET) * 2 * best["values"]["lam"], rtol=1e-6
    )
    assert_refused(run(scene, *args, "-n", "22"), "best.yaml exists", "--force")
    more = assert_done(run(scene, *args, "-n", "22", "--force"))
    assert "2 more trials are in the study" in more.out
    assert "best" in more.out
    again = assert_done(run(scene, *args, "-n", "22", "--force", "--json"))
    assert again.json["val"][:20] == trials
    assert len(again.json["val"]) == 22


def test_what_is_searched(scene: Path) -> None:
    """Named ranges; all that a name declares; all numbers where nothing is named."""
    base = ("fit", "search", "one", "two", "-b", "base", "--task", "near.py", "-n", "2", "--json")
    for number, (more, names) in enumerate((
        (("-m", "ties"), {"density", "lam"}),
        (("-m", "ties", "-p", "lam=0.5"), {"density"}),
        (("-m", "ties", "-p", "scope", "-p", "lam=0.5"), {"scope"}),
        (("-m", "ties", "-p", "lam", "--then", "scale:lam=0.5:1"), {"lam", "scale.lam"}),
        (("-m", "linear", "--then", "scale"), {"scale.lam"}),
    )):  # fmt: skip
        ran = assert_done(run(scene, *base, *more, "-o", f"{number}.yaml"))
        assert set(ran.json["val"][0]["values"]) == names


def test_an_interrupted_search_goes_on(scene: Path) -> None:
    """Ctrl-C ends with code 130 and says what is kept; the same command tries the rest."""
    (scene / "slow.py").write_text(
        "import os, pathlib, time\n"
        "class T:\n"
        "    def score(self, model, split):\n"
        "        with open('calls', 'a') as file:\n"
        "            file.write('x')\n"
        "        if os.path.getsize('calls') == 4:\n"
        "            time.sleep(60)\n"
        "        return {'w': -abs(float(model.arrays()['w'][0, 0]) - 1)}\n"
        "def task():\n    return T()\n"
    )
    words = [*SEARCH, "-p", "lam=0:2", "--task", "slow.py", "-n", "6", "-o", "best.yaml"]
    environment = os.environ | {"XDG_CACHE_HOME": str(scene / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-c", START, *words],
        cwd=scene, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    calls = scene / "calls"
    while not (calls.exists() and calls.stat().st_size == 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (130, "")
    assert "interrupted; 3 of 6 trials are kept in best.journal, the best of them lam=" in err
    assert not (scene / "best.yaml").exists()
    assert len((scene / "cache" / "mergebench" / "scores.jsonl").read_text().splitlines()) == 3
    ended = assert_done(run(scene, *words[:-4], "-n", "3", "-o", "best.yaml", "--json"))
    assert len(ended.json["val"]) == 3
    whole = assert_done(run(scene, *words, "--force", "--json"))
    assert whole.json["val"][:3] == ended.json["val"]
    assert len(whole.json["val"]) == 6
    # Six on val, the one that was interrupted again; the best of three and of six on test.
    assert (scene / "calls").read_text() in ("x" * 8, "x" * 9)


def test_failures(scene: Path) -> None:
    """Of a scorer: stop with what is kept, or go on and tell."""
    (scene / "odd.py").write_text(
        "class T:\n"
        "    def score(self, model, split):\n"
        "        w = float(model.arrays()['w'][0, 0])\n"
        "        if w > 4:\n"
        "            raise ValueError('lost the data')\n"
        "        return {'w': w if w < 3.5 else float('nan')}\n"
        "def task():\n    return T()\n"
    )
    args = (*SEARCH, "-p", "lam=0:2", "--task", "odd.py", "-o", "best.yaml", "-n", "12")
    words = ("what is scored is kept", "of 12 trials are kept in best.journal", "--on-error skip")
    assert_refused(run(scene, *args), *words)
    ran = assert_done(run(scene, *args, "--on-error", "skip"))
    assert "ValueError: lost the data" in ran.err
    assert "failed" in ran.out
    data = assert_done(run(scene, *args, "--on-error", "skip", "--force", "--json")).json
    assert any("lost the data" in each.get("problem", "") for each in data["val"])
    assert json.dumps(data)


def test_refusals(scene: Path) -> None:
    """One line, exit code 2, nothing written."""
    args = (*SEARCH, "--task", "near.py", "-n", "2", "-q")
    for more, words in (
        (("-p", "lam=2:1"), ("`lam` has no range",)),
        (("-p", "lamda=0:1"), ("no parameter `lamda`", "lam")),
        (("-p", "lamda"), ("no parameter `lamda`", "lam")),
        (("-p", "lam", "-p", "lam=0:1"), ("given twice",)),
        (("-m", "linear"), ("linear: declares no number",)),
        (("--sampler", "grid"), ("--sampler: 'grid'", "tpe")),
        (("--prune", "all"), ("--prune: 'all'",)),
        (("--study", "near.py"), ("near.py: is no study",)),
        (("--task", "two=no.py"), ("cannot be read",)),
    ):
        assert_refused(run(scene, *args, *more), *words)
    assert not list(scene.glob("*.yaml"))
    assert not list(scene.glob("*.journal"))
