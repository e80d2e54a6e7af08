"""Merges with and without data in one table: the task, what is said, and a quick run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digits_demo.checkpoints import load_model, load_state
from digits_demo.data import DOMAINS
from digits_demo.evaluate import accuracies, evaluation_sets
from digits_demo.experts import Expert
from digits_demo.fitted import learned, lines
from digits_demo.fitted_report import (
    LABELS,
    NOTHING,
    TEXTS,
    Line,
    cells,
    claimed,
    findings,
    header,
    markdown,
    row_of,
)  # fmt: skip
from digits_demo.settings import Settings, quick
from digits_demo.task import DomainTask, write_tasks

from mergebench.merge.fit.find import Setting, parse_task
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS
from mergebench.steps import parse_op
from tests.examples.running import DRIVER
from tests.helpers.running import assert_done, call

SCRIPT = Path(__file__).parents[2] / "examples" / "digits" / "run.py"


def line(title, role, *accuracies, needs=NOTHING, chosen="", seconds=None):
    """One line per seed, of one accuracy everywhere."""
    return row_of(
        [Line(title, role, dict.fromkeys(DOMAINS, a), needs, chosen, seconds) for a in accuracies]
    )


ROWS = [
    line("Base", "base", 0.1, 0.1),
    line("Experts, each in its own domain", "experts", 0.8, 1.0),
    line("Best single expert", "single", 0.4, 0.4, needs=LABELS),
    line("Uniform soup", "merge", 0.3, 0.4, seconds=0.4),
    line("Task arithmetic", "merge", 0.5, 0.5, needs=LABELS, chosen="lam=1", seconds=3.0),
    line("TIES", "merge", 0.6, 0.4, needs=LABELS, chosen="lam=1", seconds=5.0),
    line("AdaMerging", "merge", 0.6, 0.7, needs=TEXTS, seconds=9.0),
]


def test_the_table_has_means_spreads_and_shares_of_the_experts():
    assert len(header()) == 12
    assert cells(ROWS[5], ROWS[1]) == [
        "TIES", "labels", "lam=1", *["50.0"] * 6, "50.0 ± 14.1", "57.5 ± 24.7", "5",
    ]  # fmt: skip
    assert cells(ROWS[0], ROWS[1])[-1] == ""
    written = markdown(ROWS).splitlines()
    assert written[0].startswith("| model | needs | chosen | rotated |")
    assert sum(each.startswith("| ") for each in written[: 2 + len(ROWS)]) == 2 + len(ROWS)


def test_findings_and_claims_are_of_rows_that_are_there():
    assert findings(ROWS) == [
        (
            "Best of what is chosen or learned with labels: Task arithmetic with 50.0 ± 0.0 %, "
            "40.0 ± 14.1 points below the experts."
        ),
        (
            "Best of what is learned from images without labels: AdaMerging with 65.0 ± 7.1 %, "
            "25.0 ± 7.1 points below the experts."
        ),
        "No better than the best single expert: Uniform soup.",
    ]
    assert claimed(ROWS) == [
        ["2212.04089", "Task arithmetic above Uniform soup", "+15.0 ± 7.1", "2 of 2 seeds"],
        ["2306.01708", "TIES above Task arithmetic", "+0.0 ± 14.1", "1 of 2 seeds"],
        ["2310.02575", "AdaMerging above TIES", "+15.0 ± 21.2", "1 of 2 seeds"],
    ]  # fmt: skip


def assert_known(spec):
    """Method and ops of a line are there, and take the values that it lists."""
    first, *ops = spec.split("+")
    for text, known in ((first, METHODS), *((each, OPS) for each in ops)):
        named = parse_op(text)
        for key, value in named.params.items():
            for one in value.split("/") if isinstance(value, str) else [value]:
                assert known[named.name](**{key: one if key == "solver" else float(one)})


def test_every_line_is_one_that_compare_takes():
    for spec in lines(Settings()).values():
        if not spec.startswith("fit "):
            assert_known(spec)
    assert list(learned(few=True)) == ["AdaMerging"]
    assert {need for need, _ in learned().values()} == {TEXTS, LABELS}


def test_the_task_has_the_loss_and_the_digits_of_its_domain(tmp_path):
    files = write_tasks(tmp_path, 1)
    assert list(files) == list(DOMAINS)
    scorer = parse_task(str(files["noisy"]), Setting()).scorer
    digits = evaluation_sets(1, "val")["noisy"]
    batches = list(scorer.batches("val"))
    assert torch.equal(torch.cat([b["images"] for b in batches]), torch.from_numpy(digits.images))
    assert torch.equal(torch.cat([b["labels"] for b in batches]), torch.from_numpy(digits.labels))
    torch.manual_seed(0)
    module = scorer.module()
    outputs = scorer.forward(module, batches[0])
    assert torch.equal(scorer.logits(outputs, batches[0]), module(batches[0]["images"]))
    chosen = torch.log_softmax(outputs, 1)[torch.arange(32), batches[0]["labels"]]
    torch.testing.assert_close(scorer.loss(outputs, batches[0]), -chosen.mean())
    other = DomainTask(1, "mirrored")
    assert not torch.equal(next(iter(other.batches("val")))["images"], batches[0]["images"])


@pytest.fixture(scope="module")
def folders(quick_run, tmp_path_factory):
    """A quick run of the script, on models that are trained already."""
    work, out = quick_run[0], tmp_path_factory.mktemp("out")
    whole = [sys.executable, "-W", "error", DRIVER, SCRIPT, "--fitted", "--quick"]
    whole += ["--seeds", "0", "--work", work, "--out", out]
    done = subprocess.run([*map(str, whole)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return work, out, done.stdout


def test_rows_are_what_the_models_reach(folders, tmp_path):
    """The soup by hand, the learned recipe by `run`, the best single expert by validation."""
    work, out, printed = folders
    assert sorted(p.name for p in out.iterdir()) == ["digits_fitted.json", "digits_fitted.md"]
    collected = json.loads((out / "digits_fitted.json").read_text())
    assert all(sentence in printed for sentence in collected["findings"])
    found = {each["title"]: each for each in collected["seeds"][0]}
    assert list(found)[:5] == [
        "Base", "Experts, each in its own domain", "Best single expert", "Uniform soup",
        "Greedy soup",
    ]  # fmt: skip
    settings = quick(Settings(seeds=(0,)))
    experts = {d: Expert(0, d).folder(settings, work) for d in DOMAINS}
    val, test = (evaluation_sets(0, part) for part in ("val", "test"))
    for each in (val, test):
        each.pop("upright", None)
    means = {d: sum(accuracies(load_model(each), val).values()) for d, each in experts.items()}
    best = max(means, key=means.__getitem__)
    assert found["Best single expert"]["chosen"] == best
    expected = {"Best single expert": load_model(experts[best])}
    states = [load_state(each) for each in experts.values()]
    soup = load_model(experts[best])
    soup.load_state_dict({n: sum(s[n] for s in states) / len(states) for n in states[0]})
    expected["Uniform soup"] = soup
    recipe = work / "fitted" / "seed0" / "adamerging.json"
    assert_done(call("run", recipe, "-o", tmp_path / "learned", cwd=tmp_path))
    expected["AdaMerging"] = load_model(tmp_path / "learned")
    for title, model in expected.items():
        assert found[title]["values"] == pytest.approx(accuracies(model, test)), title
    own = {d: accuracies(load_model(each), {d: test[d]})[d] for d, each in experts.items()}
    assert found["Experts, each in its own domain"]["values"] == pytest.approx(own)
