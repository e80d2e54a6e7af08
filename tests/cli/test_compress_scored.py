"""``compress --task``: parameters that are chosen by what they score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.files import F32, listing, read, write
from tests.helpers.models import save_folder
from tests.helpers.running import Ran, assert_done, assert_refused, call
from tests.helpers.scene import Scene

OUT = ("-o", "p.mbz.safetensors")
ALPHAS = (0.5, 1, 1.5, 2, 3)

#: Negative squared distance of all weights from those of a model; each call leaves a line.
NEAR = """
from pathlib import Path
from safetensors.numpy import load_file


class Near:
    def score(self, model, split):
        with open("calls", "a") as file:
            print(split, file=file)
        target = load_file(f"{split}.safetensors")
        arrays = model.arrays()
        return {"near": -sum(float(((arrays[n].astype("f8") - t) ** 2).sum())
                             for n, t in target.items())}


def task():
    return Near()
"""

SAME = """
class Same:
    def score(self, model, split):
        return {"accuracy": 0.5}


def task():
    return Same()
"""

FAILS = """
class Fails:
    def score(self, model, split):
        raise OSError("no data")


def task():
    return Fails()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, a model that lies apart from it by a known update, and tasks."""
    random = np.random.default_rng(3)
    base = {"w.weight": random.standard_normal((80, 100)).astype(F32)}
    tau = 0.1 * random.standard_t(6, (80, 100)).astype(F32)
    save_folder(tmp_path / "base", base)
    tuned = {"w.weight": base["w.weight"] + tau}
    save_folder(tmp_path / "ft", tuned)
    write(tmp_path / "val.safetensors", tuned)
    write(tmp_path / "test.safetensors", {"w.weight": base["w.weight"]})
    for name, text in (("near", NEAR), ("same", SAME), ("fails", FAILS)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def run(place: Path, *args: Any) -> Ran:
    """Compress the model, with a cache of its own."""
    line = ("compress", "ft", "-b", "base", *OUT, *args)
    return call(*line, cwd=place, env={"XDG_CACHE_HOME": str(place / "cache")})


def listed(values: Any) -> str:
    """As a parameter takes several."""
    return ",".join(map(str, values))


def test_alpha_is_chosen_on_a_grid(place: Path) -> None:
    """Scores are those of base + α·std·sign on the largest fifth, and the best is kept."""
    found = assert_done(
        run(place, "-p", f"alpha={listed(ALPHAS)}", "--task", "near.py", "--json")
    ).json

    base, tuned = (read(place / name)["w.weight"].astype(np.float64) for name in ("base", "ft"))
    tau = (tuned - base).ravel()
    kept = np.argsort(-abs(tau), kind="stable")[: tau.size // 5]
    losses = {}
    for alpha in ALPHAS:
        packed = np.zeros_like(tau)
        packed[kept] = alpha * tau.std(ddof=1) * np.sign(tau[kept])
        losses[f"alpha={alpha}"] = float(((packed - tau) ** 2).sum())
    scored = found["scored"]
    values = {each["label"]: each["value"] for each in scored["trials"]}
    assert values == pytest.approx({label: -loss for label, loss in losses.items()}, rel=1e-3)
    assert scored["chosen"] == min(losses, key=lambda label: losses[label]) == "alpha=2"
    assert found["params"]["alpha"] == 2
    (plain,) = scored["not_packed"]
    assert plain["scores"]["near"] == 0.0
    for each in scored["trials"]:
        error = np.sqrt(losses[each["label"]]) / np.linalg.norm(tau)
        assert each["relative_error"] == pytest.approx(error, rel=1e-3)
    line = ("compress", "ft", "-b", "base", "-o", "q.mbz.safetensors", "-p", "alpha=2")
    assert_done(call(*line, cwd=place))
    same = [(place / f"{each}.mbz.safetensors").read_bytes() for each in "pq"]
    assert same[0] == same[1]


def test_density_and_alpha_together_on_another_split(place: Path) -> None:
    """Of every combination; the test split here is the base itself: less is better there."""
    found = assert_done(
        run(place, "-p", "density=0.05,0.3", "-p", "alpha=2,1", "-t", "near.py", "--select",
            "test", "--json")
    ).json["scored"]  # fmt: skip

    labels = [each["label"] for each in found["trials"]]
    assert labels == [f"density={k},alpha={a}" for k in (0.05, 0.3) for a in (2, 1)]
    assert (found["split"], found["chosen"]) == ("test", "density=0.05,alpha=1")
    assert set((place / "calls").read_text().split()) == {"test"}


def test_scores_are_kept(place: Path) -> None:
    """The same bytes are not measured twice, unless that is asked for."""
    args = ("-p", "alpha=1,2", "--task", "near.py", "--json")
    assert_done(run(place, *args))
    again = assert_done(run(place, *args, "--force")).json["scored"]
    assert all(each["tasks"][0]["kept"] for each in again["trials"])
    assert again["not_packed"][0]["kept"]
    assert len((place / "calls").read_text().split()) == 3
    assert_done(run(place, *args, "--force", "--no-cache"))
    assert len((place / "calls").read_text().split()) == 6
    assert_done(run(place, *args, "--force", "-p", "density=0.1"))
    assert len((place / "calls").read_text().split()) == 8


def test_the_smaller_file_wins_among_equals(place: Path) -> None:
    """Where scores do not tell them apart."""
    args = ("-p", "density=0.3,0.05,0.1", "--task", "same.py", "--json")
    found = assert_done(run(place, *args)).json
    assert found["scored"]["chosen"] == "density=0.05"
    assert found["bytes"] == (place / "p.mbz.safetensors").stat().st_size
    assert found["bytes"] == min(each["bytes"] for each in found["scored"]["trials"])


def test_the_table_shows_scores_and_losses(place: Path) -> None:
    """Score, ratio and error of every trial, with what is not packed beside them."""
    args = ("-p", "alpha=1,2", "--task", "one=same.py", "--task", "two=same.py")
    lines = [line.split() for line in assert_done(run(place, *args)).out.splitlines()]
    assert lines[0] == ["val", "one", "two", "mean", "ratio", "relative", "error", "cosine"]
    assert lines[1] == ["not", "packed", "0.5", "0.5", "0.5"]
    assert lines[2][:4] == ["alpha=1", "0.5", "0.5", "0.5"]
    assert lines[2][-1] == "best"
    assert len(lines[3]) == 7


def test_adapters_are_scored_on_their_base(scene: Scene) -> None:
    """A score is that of the model that decompress writes; a program gets the same in a folder."""
    (scene.path / "near.py").write_text(NEAR)
    program = (
        "import json,sys; from safetensors.numpy import load_file as l; "
        "a=l(sys.argv[1]+'/model.safetensors'); t=l('val.safetensors'); "
        "print(json.dumps({'near': -sum(float(((a[n].astype('f8')-t[n])**2).sum()) for n in t)}))"
    )
    update = scene.updates[0]
    tuned = {name: scene.base[name].astype(np.float64) + each for name, each in update.items()}
    write(scene.path / "val.safetensors", {name: each.astype(F32) for name, each in tuned.items()})
    python = __import__("sys").executable
    line = ("compress", "lora1", "-b", "base", *OUT, "-p", "level=std,mse", "--no-cache",
            "--task", "near.py", "--task", f"program={python} -c \"{program}\" {{path}}",
            "--json")  # fmt: skip
    found = assert_done(call(*line, cwd=scene.path)).json["scored"]

    assert found["chosen"] == "level=mse"
    decompress = ("decompress", "p.mbz.safetensors", "-b", "base", "-o", "full")
    assert_done(call(*decompress, cwd=scene.path))
    full = read(scene.path / "full")
    loss = sum(float(((full[n].astype(np.float64) - t) ** 2).sum()) for n, t in tuned.items())
    best = found["trials"][1]
    for outcome in best["tasks"]:
        assert outcome["scores"]["near"] == pytest.approx(-loss, rel=1e-5)
    assert abs(found["not_packed"][0]["scores"]["near"]) < 1e-6 * loss


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("-p", "alpha=1,2"), ("several values", "--task")),
        (("-p", "alpha=1,2,1.0", "-t", "near.py"), ("alpha", "different")),
        (("-p", "alpha=1,-2", "-t", "near.py"), ("alpha", "-2")),
        (("-p", "level=std,best", "-t", "near.py"), ("level", "best")),
        (("-p", "alpha=1,2", "-t", "nothing"), ("no task",)),
        (("-p", "alpha=1,2", "-t", "same.py", "-t", "same.py"), ("a name of its own",)),
        (("-p", "alpha=1,2", "-t", "fails.py"), ("fails", "no data")),
    ],
)
def test_mistakes_leave_nothing(place: Path, more: Any, words: Any) -> None:
    """In one line; what can be seen beforehand costs no score."""
    before = listing(place)
    assert_refused(run(place, *more), *words)
    assert listing(place) == before


def test_bases_and_outputs_are_checked_first(place: Path) -> None:
    """No scoring without a base, nor for a place that is taken."""
    args = ("-p", "alpha=1,2", "--task", "near.py")
    assert_refused(call("compress", "ft", *OUT, *args, cwd=place), "--base")
    (place / "p.mbz.safetensors").write_bytes(b"mine")
    assert_refused(run(place, *args), "exists", "--force")
    assert (place / "p.mbz.safetensors").read_bytes() == b"mine"
    assert_refused(
        call("compress", "ft", "-b", "base", "-o", "x", *args, cwd=place), ".mbz.safetensors"
    )
    assert not (place / "calls").exists()
