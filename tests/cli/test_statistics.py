"""``fit statistics`` and merges by statistics, as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.fit.networks import save_network, task_file
from tests.helpers.files import read
from tests.helpers.running import Ran, assert_done, assert_refused, call

KEY = "mergebench_statistics"


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A base, two models, a task for each, and statistics of all kinds."""
    for name, seed in (("base", 0), ("one", 1), ("two", 2)):
        save_network(tmp_path / name, seed)
    task_file(tmp_path / "a.py", 1)
    task_file(tmp_path / "b.py", 2)
    return tmp_path


def run(scene: Path, *args: Any) -> Ran:
    """With a cache of its own."""
    return call(*args, cwd=scene, env={"XDG_CACHE_HOME": str(scene / "cache")})


def collect(scene: Path, kind: str, out: str, *more: str) -> list[str]:
    """Statistics of both models."""
    args = ("fit", "statistics", "one", "two", "--kind", kind, "-t", "a.py", "-t", "b.py")
    assert_done(run(scene, *args, "-o", out, *more))
    return [f"{out}/one.safetensors", f"{out}/two.safetensors"]


def merge(scene: Path, method: str, files: list[str], *more: str) -> Ran:
    """The merge of both by their statistics."""
    given = [part for each in files for part in ("--statistics", each)]
    return run(scene, "merge", "one", "two", "-m", method, *given, *more)


def rewritten(path: Path, change: Any = None, **about: Any) -> None:
    """A statistics file with other tensors, or saying other things."""
    with safe_open(path, "np") as file:
        said = json.loads(file.metadata()[KEY])
    arrays = load_file(path)
    if change is not None:
        change(arrays)
    save_file(arrays, path, {KEY: json.dumps({**said, **about})})


@pytest.mark.parametrize(
    ("kind", "method"), [("fisher", "fisher"), ("gram", "regmean"), ("gram_pp", "regmean_pp")]
)
def test_there_and_back(scene: Path, kind: str, method: str) -> None:
    """Collected, planned, merged, verified, replayed, and run again from the stored recipe."""
    files = collect(scene, kind, "stats")
    plan = assert_done(run(scene, "plan", "one", "two", "-m", method, "--statistics", files[0],
                           "--statistics", files[1], "--json")).json  # fmt: skip
    assert sorted(plan["statistics"]) == files
    averaged = [n for c in plan["outputs"][0]["chains"] if c["ops"] == ["mean()"]
                for n in c["tensors"]]  # fmt: skip
    biases = {"layers.0.lin.bias", "layers.1.lin.bias"}
    assert set(averaged) == (set() if kind == "fisher" else biases)
    told = any("are in no statistics file and averaged" in note for note in plan["notes"])
    assert told == (kind != "fisher")
    assert_done(merge(scene, method, files, "-o", "out"))
    assert_done(run(scene, "verify", "out", "--replay", "all"))
    stored = yaml.safe_load((scene / "out" / "mergebench_recipe.yaml").read_text())
    assert {each["path"]: each["statistics"] for each in stored["models"]} == dict(
        zip(("one", "two"), files, strict=True)
    )
    assert_done(run(scene, "run", "out", "-o", "again"))
    one, two = (scene / name / "model.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()
    mean = [(read(scene / "one")[n] + read(scene / "two")[n]) / 2 for n in ("head.weight",)]
    assert not np.allclose(read(scene / "out")["head.weight"], mean[0])


def test_the_manifest_knows_statistics(scene: Path) -> None:
    """Other statistics in the same place are found by verify and refused by replay."""
    files = collect(scene, "fisher", "stats")
    assert_done(merge(scene, "fisher", files, "-o", "out"))
    manifest = json.loads((scene / "out" / "mergebench_manifest.json").read_text())
    said = [each["statistics"] for each in manifest["inputs"]]
    assert [each["kind"] for each in said] == ["fisher", "fisher"]

    def doubled(arrays: dict[str, np.ndarray]) -> None:
        arrays["head.weight"] *= 2

    rewritten(scene / files[1], doubled)
    ran = run(scene, "verify", "out", "--json")
    assert ran.code == 1
    assert "fingerprint of its statistics changed" in json.dumps(ran.json)
    assert_refused(run(scene, "verify", "out", "--replay", "all"), "of its statistics changed")
    shutil.move(scene / files[1], scene / "gone")
    assert run(scene, "verify", "out").code == 1


def test_models_named_beside_files(scene: Path) -> None:
    """In another order by name; in the wrong order they are refused."""
    one, two = collect(scene, "gram", "stats")
    assert_done(merge(scene, "regmean", [one, two], "-o", "a"))
    assert_done(merge(scene, "regmean", [f"two={two}", f"one={one}"], "-o", "b"))
    first, second = (scene / name / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert_refused(
        merge(scene, "regmean", [two, one], "-o", "c"),
        "stats/two.safetensors: is about two, whose content is not that of one",
    )
    assert_refused(merge(scene, "regmean", [f"tow={two}"], "-o", "c"), "did you mean 'two'?")
    assert_refused(merge(scene, "regmean", [one, two, two], "-o", "c"), "expected 2, got 3")
    assert not (scene / "c").exists()


def test_statistics_that_do_not_fit(scene: Path) -> None:
    """None, of another kind, of other tensors, or for a method without: one line each."""
    fishers = collect(scene, "fisher", "f")
    grams = collect(scene, "gram", "g")
    assert_refused(merge(scene, "regmean", []), "regmean needs statistics of every model")
    assert_refused(merge(scene, "fisher", fishers[:1]), "and two has none", "fit statistics")
    assert_refused(merge(scene, "regmean", fishers), "holds fisher", "regmean needs gram")
    assert_refused(merge(scene, "regmean_pp", grams), "regmean_pp needs gram_pp")
    assert_refused(merge(scene, "linear", grams), "linear uses no statistics")
    assert_refused(merge(scene, "fisher", ["one/model.safetensors"] * 2), "is no statistics file")
    assert_refused(merge(scene, "fisher", ["nowhere"] * 2), "no such statistics file")
    assert_refused(run(scene, "merge", "one", fishers[0]), "holds statistics of a model, and is")
    rewritten(scene / grams[0], lambda arrays: arrays.pop("head.weight"))
    assert_refused(merge(scene, "regmean", grams), "has nothing for 'head.weight', which g/two")
    rewritten(scene / grams[1], lambda arrays: arrays.update({"head.weight": np.ones((4, 4))}))
    assert_refused(merge(scene, "regmean", grams[:1] + grams[1:]), "has nothing for 'head.weight'")
    collect(scene, "gram", "g", "-f")
    rewritten(scene / grams[1], lambda arrays: arrays.update({"head.weight": np.ones((4, 4))}))
    assert_refused(merge(scene, "regmean", grams), "'head.weight' has shape [4, 4]", "[3, 3]")
    rewritten(scene / fishers[0], lambda arrays: arrays.clear())
    rewritten(scene / fishers[1], lambda arrays: arrays.clear())
    assert_refused(merge(scene, "fisher", fishers), "has no fisher of any tensor that is merged")


def test_damaged_statistics(scene: Path) -> None:
    """Versions, kinds and numbers that cannot be."""
    files = collect(scene, "fisher", "f")

    def spoilt(arrays: dict[str, np.ndarray]) -> None:
        arrays["head.weight"][1, 1] = np.nan

    rewritten(scene / files[0], version=2)
    assert_refused(merge(scene, "fisher", files), "version", "expected 1, got 2")
    rewritten(scene / files[0], version=1, kind=["fisher"])
    assert_refused(merge(scene, "fisher", files), "kind, expected one of fisher, gram, gram_pp")
    collect(scene, "fisher", "f", "-f")
    rewritten(scene / files[1], spoilt)
    assert_refused(
        merge(scene, "fisher", files, "-o", "out"),
        "f/two.safetensors: 1 numbers of 'head.weight' are no squares",
    )
    assert not (scene / "out").exists()


def test_an_output_is_no_place_for_an_input(scene: Path) -> None:
    """Statistics are inputs, which no output may replace."""
    files = collect(scene, "fisher", "f")
    assert_refused(merge(scene, "fisher", files, "-o", files[0], "-f"), "would replace")


def test_what_is_said_of_a_collection(scene: Path) -> None:
    """One line for each file; JSON has all; places and options are checked before work."""
    ran = assert_done(
        run(scene, "fit", "statistics", "one", "--kind", "fisher", "-t", "a.py", "-t", "b.py")
    )
    assert ran.out.startswith("statistics.safetensors: fisher of one, 5 tensors, ")
    assert ran.out.rstrip().endswith("24 examples, expected labels")
    args = ("fit", "statistics", "one", "-t", "a.py", "--kind", "fisher")
    assert_refused(run(scene, *args), "statistics.safetensors", "exists")
    (about,) = assert_done(run(scene, *args, "--labels", "sampled", "--seed", "7", "-f", "--json",
                               "--batches", "2")).json  # fmt: skip
    assert (about["examples"], about["labels"], about["seed"]) == (8, "sampled", 7)
    assert about["model"]["path"] == "one"
    assert_refused(run(scene, *args, "--kind", "fischer"), "did you mean 'fisher'?")
    assert_refused(run(scene, *args, "-o", "folder"), "name it .safetensors")
    several = ("fit", "statistics", "one", "two", "-t", "a.py")
    assert_refused(run(scene, *several), "one for each of several models", "expected 2, got 1")
    assert_refused(run(scene, *several, "-o", "x.safetensors"), "several models need a folder")


def test_parts_take_statistics_too(scene: Path) -> None:
    """One method for linear layers, another for the others; of two kinds one merge takes none."""
    files = collect(scene, "gram", "g")
    given = [part for each in files for part in ("--statistics", each)]
    args = ("merge", "one", "two", "-b", "base", "-m", "task_arithmetic", *given, "-o", "out")
    assert_done(run(scene, *args, "--method-for", "head:regmean"))
    assert_done(merge(scene, "regmean", files, "-o", "whole"))
    out, whole = read(scene / "out"), read(scene / "whole")
    np.testing.assert_allclose(out["head.weight"], whole["head.weight"], rtol=1e-5, atol=1e-6)
    name = "layers.0.lin.weight"
    base, one, two = (read(scene / model)[name] for model in ("base", "one", "two"))
    scale = json.loads((scene / "out" / "mergebench_manifest.json").read_text())
    lam = scale["recipe"]["params"]["lam"]
    np.testing.assert_allclose(out[name], base + lam * (one + two - 2 * base), rtol=1e-5, atol=1e-6)
    both = ("--method-for", "head:regmean", "--method-for", "layers:fisher", "--force")
    assert_refused(run(scene, *args, *both), "takes statistics of one kind")


def test_methods_beside_each_other(scene: Path) -> None:
    """`compare` gives each method the files of its kind, and `fit grid` searches alpha."""
    fishers, grams = collect(scene, "fisher", "f"), collect(scene, "gram", "g")
    given = [part for each in (*grams, *fishers) for part in ("--statistics", each)]
    ran = run(scene, "compare", "one", "two", "-t", "a.py", *given, "-m", "fisher", "-m",
              "regmean:alpha=0/0.9", "-m", "linear", "-m", "regmean_pp", "--json")  # fmt: skip
    lines = {each["model"]: each for each in assert_done(ran).json}
    assert lines["regmean:alpha=0/0.9"]["trials"] == 2
    values = [lines[name]["average"] for name in ("fisher", "regmean:alpha=0/0.9", "linear")]
    assert len(set(values)) == 3
    assert "needs statistics of every model" in lines["regmean_pp"]["problem"]
    some = [part for each in grams for part in ("--statistics", each)]
    args = ("fit", "grid", "one", "two", "-m", "regmean", "-p", "alpha=0,0.5", *some)
    assert_done(run(scene, *args, "-t", "a.py", "-o", "best.yaml"))
    stored = yaml.safe_load((scene / "best.yaml").read_text())
    assert {each["statistics"] for each in stored["models"]} == set(grams)
    assert_done(run(scene, "run", "best.yaml", "-o", "out"))


def test_grafting(scene: Path) -> None:
    """A file that merges like any task vector; the head is left alone unless it is asked for."""
    args = ("fit", "graft", "one", "-b", "base", "-t", "a.py", "--density", "0.2", "--epochs", "2")
    ran = assert_done(run(scene, *args, "-o", "g.safetensors", "--json")).json
    assert len(ran["history"]) == 3
    assert ran["history"][0]["entries"] == ran["entries"] // 5 == 4
    assert_done(run(scene, "merge", "g.safetensors", "-b", "base", "-m", "task_arithmetic", "-p",
                    "lam=1", "-o", "out"))  # fmt: skip
    base, tuned, out = (read(scene / name) for name in ("base", "one", "out"))
    changed = {name: out[name] != base[name] for name in base}
    assert sum(int(each.sum()) for each in changed.values()) == ran["stored"] > 0
    assert not changed["head.weight"].any()
    for name, mask in changed.items():
        np.testing.assert_allclose(out[name][mask], tuned[name][mask], rtol=1e-6, atol=1e-6)
    assert_refused(run(scene, *args, "-o", "g.safetensors"), "g.safetensors", "exists")
    whole = assert_done(run(scene, *args, "--exclude", "bias", "-o", "h.safetensors")).out
    assert "of 30 entries" in whole
    assert_refused(run(scene, *args, "--report-on", "val", "-o", "x.safetensors"), "both 'val'")


def test_ops_follow_means_by_statistics(scene: Path) -> None:
    """On a base they are means of task vectors, so that ops on updates may follow."""
    files = collect(scene, "gram", "g")
    assert_done(merge(scene, "regmean", files, "-o", "whole"))
    more = ("-b", "base", "--then", "scale:lam=0.5", "--then", "svc", "-o", "out")
    assert_done(merge(scene, "regmean", files, "-b", "base", "-o", "same"))
    assert_done(merge(scene, "regmean", files, *more))
    whole, same, out = (read(scene / name) for name in ("whole", "same", "out"))
    for name, array in whole.items():
        np.testing.assert_allclose(same[name], array, rtol=1e-4, atol=1e-5)
    assert not np.allclose(out["head.weight"], same["head.weight"])
