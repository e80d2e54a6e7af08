"""``fit`` and ``compare`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.fit.support import save_model, task_file
from tests.helpers.files import read
from tests.helpers.running import Ran, assert_done, assert_refused, call

TARGET = [[1.5, 0.0], [0.25, 1.0]]


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A base, two models that move it apart, and a task between them."""
    save_model(tmp_path / "base", np.zeros((2, 2)))
    save_model(tmp_path / "one", [[3.0, 0.0], [0.0, 0.0]])
    save_model(tmp_path / "two", [[0.0, 0.0], [0.5, 2.0]])
    task_file(tmp_path / "near.py", TARGET)
    return tmp_path


def run(scene: Path, *args: str) -> Ran:
    """With a cache of its own."""
    return call(*args, cwd=scene, env={"XDG_CACHE_HOME": str(scene / "cache")})


def test_grid(scene: Path) -> None:
    """The best combination becomes a recipe that `run` merges; nothing is measured twice."""
    args = ("fit", "grid", "one", "two", "-b", "base", "-m", "task_arithmetic", "-p",
            "lam=0.25,0.5,1", "--task", "near.py", "-o", "best.yaml")  # fmt: skip
    ran = assert_done(run(scene, *args, "--json"))
    assert ran.json["chosen"] == "lam=0.5"
    values = {each["label"]: each["value"] for each in ran.json["val"]}
    assert values["lam=0.5"] == pytest.approx(0.0, abs=1e-12)
    assert values["lam=1"] == pytest.approx(-(1.5**2 + 0.25**2 + 1.0))
    assert_refused(run(scene, *args), "best.yaml exists", "--force")
    again = assert_done(run(scene, *args, "--json", "--force"))
    assert all(task["kept"] for each in again.json["val"] for task in each["tasks"])
    stored = yaml.safe_load((scene / "best.yaml").read_text())
    assert stored["params"]["lam"] == 0.5
    assert_done(run(scene, "run", "best.yaml", "-o", "out"))
    np.testing.assert_array_equal(read(scene / "out")["w"], np.array(TARGET, np.float32))


def test_reports_of_a_grid(scene: Path) -> None:
    """A page, a picture and a table of all that was tried; never over what is there."""
    args = ("fit", "grid", "one", "two", "-b", "base", "-m", "ties", "-p", "lam=0.25,0.5,1", "-p",
            "density=0.5,1", "--then", "lines:beta=0.5", "--task", "near.py")  # fmt: skip
    out = ("--html", "g.html", "--png", "g.png", "--markdown", "g.md", "-o", "best.yaml")
    ran = assert_done(run(scene, *args, *out, "--json"))

    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (scene / "g.md").read_text().splitlines()
    ]
    assert rows[0] == ["trial", "state", "lam", "density", "near", "mean", "seconds"]
    tried = {(float(row[2]), float(row[3])): row for row in rows[2:]}
    assert set(tried) == {(lam, density) for lam in (0.25, 0.5, 1.0) for density in (0.5, 1.0)}
    for each in ran.json["val"]:
        lam, density = (float(pair.partition("=")[2]) for pair in each["label"].split(","))
        row = tried[lam, density]
        assert float(row[5]) == pytest.approx(each["value"], rel=1e-3)
        assert row[1] == ("best" if each["label"] == ran.json["chosen"] else "done")
    page = (scene / "g.html").read_text()
    assert "Grid of ties: 6 trials" in page
    assert "Scores of near on val." in page
    assert "sampled by" not in page
    assert ran.json["chosen"] in page
    assert (scene / "g.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for option, name in zip(out[::2][:3], out[1::2], strict=False):
        refused = run(scene, *args, option, name, "-o", "other.yaml")
        assert_refused(refused, name, "exists", "--force")
    assert_done(run(scene, *args, *out, "--force"))
    # What fails is told, with nothing chosen from it.
    text = (scene / "near.py").read_text()
    text = text.replace('w = np.asarray(model', 'assert "lam=1" not in model.label\n        '
                        "w = np.asarray(model")  # fmt: skip
    (scene / "near.py").write_text(text)
    more = ("--on-error", "skip", "--html", "h.html", "-o", "h.yaml")
    ran = assert_done(run(scene, *args[:-4], "--task", "near.py", *more, "--json"))
    assert [each["value"] is None for each in ran.json["val"]] == [False] * 4 + [True] * 2
    assert "AssertionError" in (scene / "h.html").read_text()


def test_tensors_left_out(scene: Path) -> None:
    """Every fit takes the filters of `merge`; what they leave out is the base's."""
    for name, w, b in (("one", [[3.0, 0.0], [0.0, 0.0]], (4.0, 0.0)),
                       ("two", [[0.0, 0.0], [0.5, 2.0]], (0.0, 4.0))):  # fmt: skip
        save_model(scene / name, w, b)
    common = ("one", "two", "-b", "base", "--task", "near.py", "--exclude", "b")
    fits = {
        "grid": ("-m", "task_arithmetic", "-p", "lam=0.25,0.5"),
        "search": ("-m", "task_arithmetic", "-p", "lam=0:1", "-n", "3"),
        "soup": (),
        "atlas": ("--epochs", "3"),
        "adamerging": ("--steps", "3"),
    }
    for name, options in fits.items():
        assert_done(run(scene, "fit", name, *common, *options, "-o", f"{name}.yaml"))
        assert yaml.safe_load((scene / f"{name}.yaml").read_text())["exclude"] == ["b"]
        assert_done(run(scene, "run", f"{name}.yaml", "-o", f"out-{name}"))
        made = read(scene / f"out-{name}")
        np.testing.assert_array_equal(made["b"], read(scene / "base")["b"])
        assert made["w"].any()
    learned = run(scene, "fit", "soup", *common, "--kind", "learned", "-o", "l.yaml")
    assert_refused(learned, "weighs all tensors", "--exclude")
    for option in ("--include", "--exclude"):
        refused = run(scene, "fit", "grid", *common, option, "nothing", "-o", "n.yaml")
        assert_refused(refused, "nothing matches no tensor")


def test_soup(scene: Path) -> None:
    """Greedy: here both together are nearest."""
    ran = assert_done(
        run(scene, "fit", "soup", "one", "two", "--task", "near=near.py", "-o", "soup.yaml")
    )
    assert "taken" in ran.out
    assert "on test: near near=" in ran.out
    stored = yaml.safe_load((scene / "soup.yaml").read_text())
    assert [each["path"] for each in stored["models"]] in (["one", "two"], ["two", "one"])
    assert stored["method"] == "linear"


def test_other_soups(scene: Path) -> None:
    """Uniform needs no choice; learned weights are positive, add up to one, and reach the merge."""
    args = ("fit", "soup", "one", "two", "--task", "near.py", "--json")
    uniform = assert_done(run(scene, *args, "--kind", "uniform", "-o", "u.yaml"))
    assert uniform.json["test"][0]["scores"]["near"] == pytest.approx(0.0)
    for by in ("model", "layer"):
        learned = (*args, "--kind", "learned", "--by", by, "--epochs", "40", "-o", f"{by}.yaml")
        ran = assert_done(run(scene, *learned))
        assert ran.json["history"][-1] <= ran.json["history"][0]
        means = {Path(name).name: mean for name, (_, mean, _) in ran.json["weights"].items()}
        assert sum(means.values()) == pytest.approx(1.0, abs=1e-6)
        assert_done(run(scene, "run", f"{by}.yaml", "-o", f"out-{by}"))
        stored = yaml.safe_load((scene / f"{by}.yaml").read_text())
        assert stored["method"] == "linear"
        weights = [each["weight"] for each in stored["models"]]
        numbers = weights if by == "model" else [each["by_name"]["w"] for each in weights]
        place = [Path(each["path"]).name for each in stored["models"]].index("one")
        wanted = np.array(
            [[3.0 * numbers[place], 0], [0.5 * numbers[1 - place], 2 * numbers[1 - place]]]
        )
        np.testing.assert_allclose(read(scene / f"out-{by}")["w"], wanted, rtol=1e-5)
    assert not list(scene.glob("*.state"))


def test_atlas(scene: Path) -> None:
    """Coefficients of every tensor stand in the recipe, and it merges to what was learned."""
    ran = assert_done(
        run(
            scene,
            "fit",
            "atlas",
            "one",
            "two",
            "-b",
            "base",
            "--task",
            "near.py",
            "--epochs",
            "600",
            "--rate",
            "0.01",
            "-o",
            "learned.yaml",
            "--json",
        )
    )
    assert ran.json["history"][-1] < 1e-2 < ran.json["history"][0]
    assert ran.json["test"][0]["scores"]["near"] > -1e-2
    stored = yaml.safe_load((scene / "learned.yaml").read_text())
    assert set(stored["models"][0]["weight"]["by_name"]) == {"w"}
    assert_done(run(scene, "run", "learned.yaml", "-o", "out"))
    np.testing.assert_allclose(read(scene / "out")["w"], TARGET, atol=0.1)


def test_recipes_of_many_parts(scene: Path) -> None:
    """A recipe of a megabyte is written, planned, merged, replayed and stored like any other."""
    for name, w, b in (("one", [[3.0, 0.0], [0.0, 0.0]], (1, 0)),
                       ("two", [[0.0, 0.0], [0.5, 2.0]], (0, 1))):  # fmt: skip
        save_model(scene / name, w, b)
    args = ("fit", "atlas", "one", "two", "-b", "base", "--task", "near.py", "--epochs", "300",
            "--rate", "0.02", "--parts", "65536", "-o", "parts.yaml", "--json")  # fmt: skip
    ran = assert_done(run(scene, *args))
    assert ran.json["history"][-1] < 0.1 < ran.json["history"][0]
    assert (scene / "parts.yaml").stat().st_size > 1 << 20
    plan = assert_done(run(scene, "run", "parts.yaml", "-o", "out", "--dry-run"))
    assert "characters)" in plan.out
    assert len(plan.out) < 10_000
    for out in ("out", "out.safetensors"):
        assert_done(run(scene, "run", "parts.yaml", "-o", out))
        assert_done(run(scene, "verify", out, "--replay", "all"))
    stored = scene / "out" / "mergebench_recipe.yaml"
    assert_done(run(scene, "run", str(stored), "-o", "again"))
    for name, each in read(scene / "out").items():
        np.testing.assert_array_equal(each, read(scene / "again")[name])
        np.testing.assert_array_equal(each, read(scene / "out.safetensors")[name])
    np.testing.assert_allclose(read(scene / "out")["w"], TARGET, atol=0.2)
    card = (scene / "out" / "README.md").read_text()
    assert f"`mergebench_recipe.yaml` beside this file, {stored.stat().st_size:,} char" in card
    assert len(card) < 2000
    lines = assert_done(run(scene, "compare", "one", "two", "-b", "base", "--task", "near.py",
                            "-m", "parts.yaml", "--json")).json  # fmt: skip
    assert lines[-1]["average"] == pytest.approx(ran.json["test"][0]["scores"]["near"], abs=1e-5)


def test_recipes_of_too_many_parts(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are refused before anything is learned."""
    monkeypatch.setattr("mergebench.recipe.reading.LARGEST", 1 << 20)
    args = ("fit", "atlas", "one", "two", "-b", "base", "--task", "near.py", "-o", "parts.yaml")
    refused = run(scene, *args, "--parts", "65536")
    assert_refused(refused, "the recipe might have", "at most 1 MiB", "fewer --parts")
    assert not (scene / "parts.yaml").exists()


def test_adamerging(scene: Path) -> None:
    """Needs no labels, and stays within its bounds."""
    ran = assert_done(
        run(scene, "fit", "adamerging", "one", "two", "-b", "base", "--task", "near.py", "--json")
    )
    assert all(0 <= low <= high <= 1 for low, _, high in ran.json["coefficients"].values())


def test_adamerging_plus(scene: Path) -> None:
    """Is a recipe of TIES that sums, with a weight for each tensor."""
    args = ("fit", "adamerging", "one", "two", "-b", "base", "--task", "near.py", "--plus")
    more = ("--density", "0.5", "--steps", "5", "--by", "task", "-o", "plus.yaml", "--json")
    ran = assert_done(run(scene, *args, *more))
    stored = yaml.safe_load((scene / "plus.yaml").read_text())
    assert (stored["method"], stored["as"]) == ("ties", "model")
    assert (stored["params"]["divisor"], stored["params"]["density"]) == ("none", 0.5)
    found = {Path(name).name: each for name, each in ran.json["coefficients"].items()}
    assert all(low == high for low, _, high in found.values())
    one, two = found["one"][0], found["two"][0]
    assert_done(run(scene, "run", "plus.yaml", "-o", "out"))
    # Half of six entries stay: all that differ from zero. No sign disagrees.
    wanted = np.array([[3.0 * one, 0.0], [0.5 * two, 2.0 * two]])
    np.testing.assert_allclose(read(scene / "out")["w"], wanted, rtol=1e-6)


def test_atlas_in_parts(scene: Path) -> None:
    """What is learned of parts is merged by `run` without any mask."""
    args = ("fit", "atlas", "one", "two", "-b", "base", "--task", "near.py", "--parts", "3",
            "--epochs", "300", "--rate", "0.02", "-o", "parts.yaml", "--json")  # fmt: skip
    ran = assert_done(run(scene, *args))
    assert ran.json["test"][0]["scores"]["near"] > -1e-2
    stored = yaml.safe_load((scene / "parts.yaml").read_text())
    assert stored["method"] == "atlas"
    numbers = stored["models"][0]["params"]["coefficients"]["by_name"]["w"]
    assert len(numbers.split("/")) == 3
    assert_done(run(scene, "run", "parts.yaml", "-o", "out"))
    np.testing.assert_allclose(read(scene / "out")["w"], TARGET, atol=0.1)


def test_atlas_chooses(scene: Path) -> None:
    """Epochs by scores, blocks by gradients within a budget; few steps are noted."""
    args = ("fit", "atlas", "one", "two", "-b", "base", "--task", "near.py", "--epochs", "4")
    more = ("--select", "dev", "--patience", "2", "--blocks", "1", "--rate", "0.3", "-o", "a.yaml")
    ran = assert_done(run(scene, *args, *more, "--json"))
    assert len(ran.json["scores"]) == len(ran.json["history"]) + 1
    assert ran.json["scores"][ran.json["epoch"]] == max(ran.json["scores"])
    stored = yaml.safe_load((scene / "a.yaml").read_text())
    held = [each["path"] for each in stored["models"] if each["weight"] != 0.0]
    assert [Path(each).name for each in held] == ["one"]
    words = assert_done(run(scene, *args, "--budget", "8B", "-o", "b.yaml"))
    assert "coefficients move by 0.004 at most" in words.out
    assert "--rate" in words.out
    assert "taken" not in words.out
    spoken = assert_done(run(scene, *args, "--select", "dev", "-o", "c.yaml", "--rate", "0.3"))
    assert "which is taken" in spoken.out
    assert "at most" not in spoken.out


def test_a_fit_that_was_interrupted_goes_on(scene: Path) -> None:
    """Killed by its task, run again: the same recipe as without."""
    whole = (scene / "near.py").read_text()
    dying = whole.replace(
        "        w, b = outputs\n",
        "        w, b = outputs\n"
        "        import pathlib\n"
        "        calls = pathlib.Path('calls')\n"
        "        count = int(calls.read_text()) if calls.exists() else 0\n"
        "        calls.write_text(str(count + 1))\n"
        "        if count == 5:\n"
        "            raise KeyboardInterrupt\n",
    )
    assert dying != whole
    args = ("fit", "atlas", "one", "two", "-b", "base", "--task", "near.py", "--epochs", "8",
            "--rate", "0.1", "-q")  # fmt: skip
    assert_done(run(scene, *args, "-o", "wanted.yaml"))
    (scene / "near.py").write_text(dying)
    ran = run(scene, *args, "-o", "got.yaml")
    assert ran.code == 130
    assert "run the same command again" in ran.err
    assert (scene / "got.yaml.state").exists()
    assert not (scene / "got.yaml").exists()
    assert_refused(run(scene, *args, "--seed", "1", "-o", "got.yaml"), "another fit", "remove")
    again = assert_done(run(scene, *args[:-1], "-o", "got.yaml"))
    assert "going on with got.yaml.state" in again.err
    assert (scene / "got.yaml").read_text() == (scene / "wanted.yaml").read_text()
    # Six calls, of which the last was lost, and three more: none was taken twice.
    assert (scene / "calls").read_text() == "9"
    assert not (scene / "got.yaml.state").exists()


def test_compare(scene: Path) -> None:
    """Base, models, methods: chosen on one split, measured on the other, in every form."""
    args = ("compare", "one", "two", "-b", "base", "--task", "near.py", "-m", "linear",
            "-m", "task_arithmetic:lam=0.25/0.5+scale:lam=2", "-m", "karcher")  # fmt: skip
    ran = assert_done(run(scene, *args, "--json", "--markdown", "table.md"))
    lines = {each["model"]: each for each in ran.json}
    assert [each["role"] for each in ran.json] == ["base", "expert", "expert"] + ["merge"] * 3
    far = -(1.5**2 + 0.25**2 + 1.0)
    assert lines["base"]["average"] == pytest.approx(far)
    assert lines["linear"]["average"] == pytest.approx(0.0)
    chosen = lines["task_arithmetic:lam=0.25/0.5+scale:lam=2"]
    assert (chosen["chosen"], chosen["trials"]) == ("lam=0.25", 2)
    assert chosen["average"] == pytest.approx(0.0)
    table = (scene / "table.md").read_text().splitlines()
    assert len(table) == 2 + 6
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert "linear" in assert_done(run(scene, *args)).out


def test_a_method_that_cannot(scene: Path) -> None:
    """Is a line without numbers and a note, and the others are measured."""
    args = ("compare", "one", "two", "-b", "base", "--task", "near.py", "-m", "emr", "-m", "ties")
    ran = assert_done(run(scene, *args, "--json"))
    assert "gives 2 models" in ran.json[-2]["problem"]
    assert ran.json[-1]["average"] is not None
    assert_refused(run(scene, *args, "--on-error", "stop", "-q", "--json"), "gives 2 models")


def test_refusals(scene: Path) -> None:
    """One line, exit code 2, nothing written."""
    (scene / "bad.py").write_text("def task():\n    raise RuntimeError('no data')\n")
    (scene / "nan.py").write_text(
        "class T:\n    def score(self, model, split):\n        return {'x': float('nan')}\n"
        "def task():\n    return T()\n"
    )
    grid = ("fit", "grid", "one", "two", "-b", "base", "-m", "ties", "-p", "lam=0.5,1")
    atlas = ("fit", "atlas", "one", "two", "-b", "base", "--task", "near.py", "-q")
    for args, words in (
        (grid, ("tasks: one or more",)),
        ((*grid, "--task", "what"), ("is no task",)),
        ((*grid, "--task", "bad.py"), ("could not be made", "no data")),
        ((*grid, "--task", "nan.py", "-q"), ("task nan: x is not finite", "lam=0.5")),
        ((*grid, "--task", "near.py", "--on-error", "go"), ("--on-error", "stop")),
        ((*grid, "--task", "near.py", "-p", "lamda=1"), ("lamda",)),
        (("fit", "soup", "one", "--task", "near.py", "--accept", "="), ("--accept",)),
        (("fit", "soup", "one", "--task", "near.py", "--kind", "lerned"), ("--kind", "learned")),
        (("fit", "soup", "one", "--task", "near.py", "--by", "tensor"), ("--by",)),
        ((*atlas, "--setting", "few"), ("--setting", "few-shot")),
        ((*atlas, "--setting", "negation"), ("no task to forget", "--forget TASK")),
        ((*atlas, "--objective", "entropi"), ("--objective", "entropy")),
        ((*atlas, "--precision", "int8"), ("--precision",)),
        ((*atlas, "--compat", "offical"), ("--compat", "official")),
        ((*atlas, "--device", "cuda:99"), ("--device", "there is none")),
        (
            ("fit", "graft", "one", "-b", "base", "--task", "near.py", "--device", "cuda:99"),
            ("--device", "there is none"),
        ),
        (
            ("fit", "statistics", "one", "--task", "near.py", "--device", "gpu"),
            ("--device: 'gpu'",),
        ),
        ((*atlas, "--select", "test"), ("--select and --report-on",)),
        ((*atlas, "--shots", "2"), ("a few examples of each class", "--shots")),
        ((*atlas, "--budget", "1B"), ("--budget: no block",)),
        ((*atlas, "--budget", "x"), ("--budget",)),
        (("fit", "atlas", "one", "--task", "near.py"), ("add --base",)),
        (
            ("fit", "atlas", "one", "-b", "base", "--task", "near.py", "--forget", "far"),
            ("--forget: no task 'far'", "near"),
        ),
        (
            ("fit", "atlas", "one", "-b", "base", "--task", "near.py", "--learn-on", "test"),
            ("--learn-on and --report-on",),
        ),
        (
            ("fit", "atlas", "one", "-b", "base", "--task", "t=program {path}"),
            ("task t: cannot be learned from",),
        ),
        (("compare", "one", "--task", "near.py", "-m", "tees"), ("no merge method 'tees'", "ties")),
    ):
        assert_refused(run(scene, *args), *words)
    assert not list(scene.glob("*.yaml"))


def test_kept_scores_survive_a_failure(scene: Path) -> None:
    """What was measured before the scorer failed is not measured again."""
    (scene / "odd.py").write_text(
        "import pathlib\n"
        "class T:\n"
        "    def score(self, model, split):\n"
        "        calls = pathlib.Path('calls')\n"
        "        count = len(calls.read_text()) if calls.exists() else 0\n"
        "        calls.write_text('x' * (count + 1))\n"
        "        if count == 1:\n"
        "            raise ValueError('lost the data')\n"
        "        return {'w': float(model.arrays()['w'][0, 0])}\n"
        "def task():\n    return T()\n"
    )
    args = ("fit", "grid", "one", "two", "-b", "base", "-m", "task_arithmetic", "-p", "lam=0.5,1",
            "--task", "odd.py", "-q")  # fmt: skip
    assert_refused(run(scene, *args), "lost the data", "what is scored is kept")
    assert_done(run(scene, *args))
    # Two on val of which one failed, that one again, and the best on test.
    assert (scene / "calls").read_text() == "xxxx"
    kept = (scene / "cache" / "mergebench" / "scores.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["scores"]["w"] for line in kept) == [1.5, 3.0, 3.0]
