"""A quick run of the script on its own sample, and what is said of a table."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from text_demo.merges import LABELS, NOTHING, TEXTS, Row, learned, methods
from text_demo.report import cells, findings, header, markdown
from text_demo.settings import Settings, chosen

from mergebench.merge.fit.find import Setting, parse_task
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS
from mergebench.steps import parse_op
from tests.examples.running import DRIVER, ran_once
from tests.examples.text_support import sample, tiny_bert
from tests.helpers.running import assert_done, call

SCRIPT = Path(__file__).parents[2] / "examples" / "text_tasks" / "run.py"
ROWS = [
    Row("Base", "base", {"a": 0.4, "b": 0.2}),
    Row("Experts, each on its own task", "experts", {"a": 0.8, "b": 1.0}),
    Row("Best single expert", "single", {"a": 0.8, "b": 0.3}, chosen="a"),
    Row("Average", "merge", {"a": 0.5, "b": 0.5}, NOTHING, "", 1.0),
    Row("TIES", "merge", {"a": 0.72, "b": 0.9}, LABELS, "lam=1", 3.4),
    Row("AdaMerging", "merge", {"a": 0.8, "b": 0.9}, TEXTS),
]


def test_a_table_has_averages_and_shares_of_the_experts():
    assert header(["a", "b"]) == [
        "model", "needs", "chosen", "a", "b", "average", "normalised", "seconds",
    ]  # fmt: skip
    own = ROWS[1].values
    assert cells(ROWS[4], own) == [
        "TIES", "labels", "lam=1", "72.0", "90.0", "81.0", "90.0", "3",
    ]  # fmt: skip
    assert cells(ROWS[5], own)[-3:] == ["85.0", "95.0", ""]
    broken = Row("Iso-C", "merge", {}, problem="too wide")
    assert cells(broken, own)[3:] == ["–", "–", "–", "–", ""]
    written = markdown([*ROWS, broken], "lora")
    assert written.startswith("## LoRAs\n")
    assert "- Iso-C could not be merged: too wide" in written


def test_findings_name_the_best_with_and_without_gradients():
    said = findings(ROWS)
    assert said == [
        "The best merge without gradients is TIES with 81.0 %, 9.0 points below the experts.",
        (
            "The best that learned from texts without labels is AdaMerging with 85.0 %, "
            "4.0 points above TIES."
        ),
        "No better than the best single expert: Average.",
    ]
    level = [*ROWS[:5], Row("AdaMerging", "merge", ROWS[4].values, TEXTS)]
    assert findings(level)[1].endswith("with 81.0 %, level with TIES.")


def assert_known(spec):
    """Method and ops of a line are there, and take the values that it lists."""
    first, *ops = spec.split("+")
    for text, known in ((first, METHODS), *((each, OPS) for each in ops)):
        named = parse_op(text)
        for key, value in named.params.items():
            for one in value.split("/") if isinstance(value, str) else [value]:
                assert known[named.name](**{key: one if key == "solver" else float(one)})


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_line_is_one_that_compare_takes(kind):
    for few in (True, False):
        for spec in methods(kind, few).values():
            assert_known(spec)
    assert {"KnOTS TIES", "Core Space TIES"} <= set(methods("lora")) - set(methods("full"))
    needs = {title: each.needs for title, each in learned(Settings()).items()}
    assert needs["AdaMerging"] == TEXTS
    assert needs["aTLAS"] == LABELS


def test_what_is_given_replaces_what_is_quick():
    assert chosen(quick=True).limit == 60
    settings = chosen(quick=True, limit=9, epochs=3, seed=5)
    assert (settings.limit, settings.seed, settings.few) == (9, 5, True)
    assert settings.full.epochs == settings.lora.epochs == 3
    assert chosen(quick=False) == Settings()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One quick run through the installed command: its folders and printed text."""

    def ready(folder):
        base = tiny_bert(folder / "work" / "bert", sample(folder / "work" / "files"))
        return [DRIVER, SCRIPT, "--quick", "--base", base]

    return ran_once(tmp_path_factory, "texts", ready)


def test_the_run_leaves_tables_and_recipes(folders):
    _, out, printed = folders
    assert sorted(path.name for path in out.iterdir()) == [
        "recipes-full", "recipes-lora", "text_tasks.json", "text_tasks.md",
    ]  # fmt: skip
    assert "trained 6 models" in printed
    collected = json.loads((out / "text_tasks.json").read_text())
    written = (out / "text_tasks.md").read_text()
    for kind in ("full", "lora"):
        rows = collected["rows"][kind]
        assert [row["title"] for row in rows] == [
            "Base", "Experts, each on its own task", "Best single expert", "Average",
            "Task arithmetic", "TSV-M", "AdaMerging", "TSV-M, AdaMerging",
        ]  # fmt: skip
        assert all(row["values"].keys() == {"topics", "questions", "mood"} for row in rows)
        assert not any(row["problem"] for row in rows)
    assert "## Full fine-tunes" in written
    assert "## LoRAs" in written


def test_parts_add_up_to_what_they_are_parts_of(folders, tmp_path):
    """Four times TSV-M, to what is left of the others in each of them."""
    from safetensors.numpy import load_file

    work, out, _ = folders
    (base,) = work.glob("base-*")
    experts = sorted((work / "full").iterdir())
    merge = ("merge", *experts, "--base", base, "-m", "tsv_merge", "-p", "lam=4")
    assert_done(call(*merge, "-o", tmp_path / "tsv", cwd=tmp_path))
    start, merged = (load_file(f / "model.safetensors") for f in (base, tmp_path / "tsv"))
    parts = [load_file(f / "model.safetensors") for f in (out / "recipes-full" / "parts").iterdir()]
    assert len(parts) == 3
    moved = 0
    for name, values in start.items():
        expected = merged[name] - values
        found = sum(part[name] - values for part in parts)
        np.testing.assert_allclose(found, 1.002 * expected, rtol=0, atol=2e-5, err_msg=name)
        moved += int(np.abs(expected).max() > 1e-3)
    assert moved > 20


class Held:
    """A model under test whose arrays are there already."""

    label = "held"

    def __init__(self, arrays):
        self.values = arrays

    def arrays(self):
        return self.values


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_rows_are_what_the_command_merges(folders, tmp_path, kind):
    """The soup by hand, and the learned recipe by `run`, reach what the table says."""
    from safetensors.numpy import load_file

    work, out, _ = folders
    (base,) = work.glob("base-*")
    rows = {
        row["title"]: row for row in json.loads((out / "text_tasks.json").read_text())["rows"][kind]
    }
    recipe = out / f"recipes-{kind}" / "adamerging.yaml"
    merges = {"AdaMerging": ["run", recipe]}
    experts = sorted((work / kind).iterdir())
    assert len(experts) == 3
    merges["Average"] = ["merge", *experts, "--base", base, "-m", "linear"]
    if kind == "full":
        del merges["Average"]
    arrays = {}
    for title, line in merges.items():
        place = tmp_path / title
        form = () if title == "AdaMerging" else ("--as", "model")
        assert_done(call(*line, *form, "-o", place, cwd=tmp_path))
        file = place / "model.safetensors"
        if file.exists():
            arrays[title] = load_file(file)
    if kind == "full":
        tensors = [load_file(each / "model.safetensors") for each in experts]
        arrays["Average"] = {name: sum(t[name] for t in tensors) / 3 for name in tensors[0]}
    assert "Average" in arrays
    for title, values in arrays.items():
        for task, expected in rows[title]["values"].items():
            spec = f"classify:{work / 'tasks' / f'{task}.json'}"
            scorer = parse_task(spec, Setting(base)).scorer
            assert scorer.score(Held(values), "test")["accuracy"] == pytest.approx(expected)


def test_a_broken_file_ends_with_one_line(tmp_path):
    bad, good = tmp_path / "bad.csv", tmp_path / "good.csv"
    for path in (bad, good):
        path.write_text("words,label\na,b\n")
    line = [sys.executable, SCRIPT, bad, good, "--work", tmp_path / "w", "--out", tmp_path / "o"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"{bad}, line 2: needs a `text` and a `label`\n"
    assert not (tmp_path / "o").exists()
