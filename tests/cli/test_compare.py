"""``compare`` as a user runs it: lines of every kind, failures, interrupts, and what is written."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fit.support import save_model, task_file
from tests.helpers.files import read
from tests.helpers.running import START, Ran, assert_done, assert_refused, call

TARGET = [[1.5, 0.0], [0.25, 1.0]]
COMPARE = ("compare", "one", "two", "-b", "base", "--task", "near.py")


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A base, two models that move it apart, and a task between them: λ = 0.5."""
    save_model(tmp_path / "base", np.zeros((2, 2)))
    save_model(tmp_path / "one", [[3.0, 0.0], [0.0, 0.0]])
    save_model(tmp_path / "two", [[0.0, 0.0], [0.5, 2.0]])
    (tmp_path / "base" / "config.json").write_text("{}")
    task_file(tmp_path / "near.py", TARGET)
    return tmp_path


def run(scene: Path, *args: str) -> Ran:
    """With a cache of its own."""
    return call(*args, cwd=scene, env={"XDG_CACHE_HOME": str(scene / "cache")})


def test_lines_of_every_kind(scene: Path) -> None:
    """Methods with values for all, a recipe, fits with a scorer, with gradients and a search."""
    grid = ("fit", "grid", "one", "two", "-b", "base", "-m", "task_arithmetic", "-p", "lam=0.25")
    assert_done(run(scene, *grid, "--task", "near.py", "-o", "quarter.yaml"))
    lines = ("task_arithmetic", "ties+lines:beta=0.2/0.4", "quarter.yaml", "fit soup",
             "fit atlas --epochs 3", "fit search -m task_arithmetic -p lam=0:2 -n 5",
             "fit grid -m task_arithmetic -p lam=0.1,0.5")  # fmt: skip
    args = (
        *COMPARE,
        *(word for line in lines for word in ("-m", line)),
        "--grid",
        "lam=0.25:1:0.25",
    )
    ran = assert_done(run(scene, *args, "--json"))

    found = {each["model"]: each for each in ran.json}
    assert list(found) == ["base", "one", "two", *lines]
    assert (found["task_arithmetic"]["chosen"], found["task_arithmetic"]["trials"]) == (
        "lam=0.5",
        4,
    )
    assert found[lines[1]]["trials"] == 8
    assert found["quarter.yaml"]["recipe"]["params"]["lam"] == 0.25
    assert found["quarter.yaml"]["trials"] == 1
    assert found["fit soup"]["average"] == pytest.approx(0.0)
    assert found["fit soup"]["chosen"] == "2 of 2"
    alone = {each["label"]: each["value"] for each in found["fit soup"]["selection"]}
    assert alone["one"] == pytest.approx(found["one"]["average"])
    weights = found["fit atlas --epochs 3"]["recipe"]["models"][0]["weight"]
    assert set(weights["by_name"]) == {"w"}
    assert found[lines[5]]["trials"] == 5
    assert found[lines[5]]["chosen"].startswith("lam=")
    assert found[lines[6]]["chosen"] == "lam=0.5"
    assert all(
        each["cost"]["choosing"] > 0 for each in ran.json[3:] if each["model"] != "quarter.yaml"
    )
    again = assert_done(run(scene, *args, "--json"))
    assert all(task["kept"] for each in again.json for task in each["tasks"])
    for one, other in zip(ran.json, again.json, strict=True):
        assert (one["recipe"], one["values"]) == (other["recipe"], other["values"])
        assert other["cost"]["choosing"] == pytest.approx(one["cost"]["choosing"], abs=0.01)


def test_fits_that_learn_choose_no_epoch_by_scores(scene: Path) -> None:
    """Unless their line says so: of scores that are all equal, the start is the best."""
    text = (scene / "near.py").read_text()
    start = text.index("        w = np.asarray(model")
    end = text.index("    def module(self)")
    flat = text[:start] + '        return {"near": 1.0}\n\n' + text[end:]
    (scene / "near.py").write_text(flat)
    lines = ("fit atlas --epochs 3", "fit atlas --epochs 3 --select val")
    words = [word for line in lines for word in ("-m", line)]
    plain, watched = assert_done(run(scene, *COMPARE, *words, "--json")).json[3:]

    def numbers(line: dict[str, Any]) -> list[float]:
        return [each["weight"]["by_name"]["w"] for each in line["recipe"]["models"]]

    assert all(numbers(plain))
    assert not any(numbers(watched))


def test_tensors_left_out(scene: Path) -> None:
    """Of every merge, fits among them; what was left out is the base's. Models stay as they are."""
    for name in ("one", "two"):
        save_model(scene / name, read(scene / name)["w"], (4.0, -4.0))
    text = (scene / "near.py").read_text()
    both = text.replace('return {"near"', 'b = float((model.arrays()["b"] ** 2).sum())\n'
                        '        return {"b": b, "near"')  # fmt: skip
    (scene / "near.py").write_text(both)
    lines = ("linear", "task_arithmetic:lam=0.5", "ties+lines", "fit soup", "fit atlas --epochs 2")
    words = [word for line in lines for word in ("-m", line)]

    def found(*more: str) -> dict[str, float]:
        ran = assert_done(run(scene, *COMPARE, *words, *more, "--json"))
        return {each["model"]: each["tasks"][0]["scores"]["b"] for each in ran.json}

    whole, without = found(), found("--exclude", "b")
    assert {name: whole[name] for name in ("base", "one", "two")} == {
        "base": 0.0, "one": 32.0, "two": 32.0,
    }  # fmt: skip
    assert all(whole[line] > 0 for line in lines[:-1])
    assert without == {**{name: whole[name] for name in ("base", "one", "two")},
                       **dict.fromkeys(lines, 0.0)}  # fmt: skip
    assert found("--include", "w") == without
    assert_refused(run(scene, *COMPARE, "--exclude", "nothing", "-m", "linear", "--on-error",
                       "stop"), "nothing matches no tensor")  # fmt: skip


def test_what_is_written(scene: Path) -> None:
    """A page, a picture and Markdown; never over what is there."""
    out = ("--html", "c.html", "--png", "c.png", "--markdown", "c.md")
    args = (*COMPARE, "-m", "linear", "-m", "task_arithmetic:lam=0.25/0.5", "-m", "emr", *out)
    ran = assert_done(run(scene, *args))

    page = (scene / "c.html").read_text()
    assert "Comparison of 3 merges on 1 task" in page
    assert "emr gives 2 models" in page
    assert "default-src &#39;none&#39;" in page
    assert (scene / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = (scene / "c.md").read_text().splitlines()
    assert len(table) == 2 + 6
    for row in table[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert " ".join(filter(None, cells)) in " ".join(ran.out.split())
    for name in ("c.html", "c.png", "c.md"):
        (option,) = [out[i - 1] for i, each in enumerate(out) if each == name]
        assert_refused(run(scene, *COMPARE, option, name), f"{name}", "exists", "--force")
    before = (scene / "c.html").read_bytes(), (scene / "c.png").read_bytes()
    assert_done(run(scene, *args, "--force"))
    assert ((scene / "c.html").read_bytes(), (scene / "c.png").read_bytes()) == before
    # Nothing could be drawn of a table without numbers; it is told, and the page is there.
    (scene / "bad.py").write_text(
        "class T:\n    def score(self, model, split):\n        raise ValueError('no data')\n"
        "def task():\n    return T()\n"
    )
    args = ("compare", "one", "--task", "bad.py", "-m", "linear", "--html", "d.html", "--png",
            "d.png")  # fmt: skip
    assert "no data" in assert_done(run(scene, *args)).err
    assert "no data" in (scene / "d.html").read_text()


def test_a_command_that_hangs(scene: Path) -> None:
    """Is ended with its children when its time is over; the lines it answered for are shown."""
    script = (
        "case {label} in task_arithmetic) (sleep 61 & echo $! > child; wait);; "
        '*) echo "{\\"x\\": 1}";; esac'
    )
    task = f"t=sh -c {shlex.quote(script)} {{path}}"
    args = ("compare", "one", "two", "-b", "base", "--task", task, "--timeout", "3",
            "-m", "task_arithmetic", "-m", "linear", "--json")  # fmt: skip
    started = time.monotonic()
    ran = assert_done(run(scene, *args))

    assert time.monotonic() - started < 50
    found = {each["model"]: each for each in ran.json}
    assert found["linear"]["average"] == 1.0
    assert found["task_arithmetic"]["average"] is None
    assert "took longer than 3 s" in found["task_arithmetic"]["tasks"][0]["problem"]
    child = Path(f"/proc/{int((scene / 'child').read_text())}/cmdline")
    assert not child.exists() or b"sleep" not in child.read_bytes()
    assert_refused(run(scene, *args[:-1], "--on-error", "stop", "-q"), "took longer than 3 s",
                   "what was scored is kept")  # fmt: skip


def test_an_interrupted_comparison_goes_on(scene: Path) -> None:
    """Ctrl-C says what is kept; the same command measures the rest only."""
    (scene / "slow.py").write_text(
        "import os, time\n"
        "class T:\n"
        "    def score(self, model, split):\n"
        "        with open('calls', 'a') as file:\n"
        "            file.write(model.label + '\\n')\n"
        "        with open('calls') as file:\n"
        "            count = len(file.readlines())\n"
        "        if count == 6:\n"
        "            time.sleep(60)\n"
        "        return {'w': float(model.arrays()['w'][0, 0])}\n"
        "def task():\n    return T()\n"
    )
    words = ["compare", "one", "two", "-b", "base", "--task", "slow.py", "-m", "linear",
             "-m", "task_arithmetic:lam=0.3/0.4/0.5", "-m", "ties"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", START, *words],
        cwd=scene, env=os.environ | {"XDG_CACHE_HOME": str(scene / "cache")}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    calls, deadline = scene / "calls", time.monotonic() + 120
    while time.monotonic() < deadline:
        if calls.exists() and len(calls.read_text().splitlines()) == 6:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (130, "")
    assert "interrupted; what was scored is kept; the same command goes on" in err
    assert_done(run(scene, *words))
    assert calls.read_text().split() == [
        "base", "one", "two", "linear", "lam=0.3", "lam=0.4", "lam=0.4", "lam=0.5",
        "task_arithmetic:lam=0.3/0.4/0.5", "ties",
    ]  # fmt: skip


def test_refusals(scene: Path) -> None:
    """One line, exit code 2, before anything is scored."""
    for more, words in (
        (("-m", "linear", "-m", "linear"), ("given twice",)),
        (("-m", "none.yaml"), ("none.yaml: no such recipe",)),
        (("-m", "fit soap"), ("'fit soap': there is no such fit", "soup")),
        (("-m", "fit "), ("'fit': names no fit",)),
        (("-m", "fit search --trails 3"), ("'fit search --trails 3'", "--trails", "--trials")),
        (("-m", "fit soup -o x.yaml"), ("-o is said by the comparison",)),
        (("-m", "linear", "--grid", "lam=0.1/0.2"), ("no line has a parameter 'lam'",)),
        (("-m", "ties", "--grid", "lam"), ("name=value",)),
        (("--html", "page.txt"), ("--html page.txt: is no name of a page",)),
        (("--png", "c.jpg"), ("--png c.jpg: is no name of a picture", ".png")),
        (("--png", "no/c.png"), ("no is no folder",)),
    ):
        assert_refused(run(scene, *COMPARE, *more), *words)
    assert not (scene / "cache").exists()
