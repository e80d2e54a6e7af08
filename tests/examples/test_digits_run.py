import json
from pathlib import Path

import numpy as np
import pytest
from digits_demo.checkpoints import load_model
from digits_demo.data import DOMAINS
from digits_demo.evaluate import accuracies, domain_mean, evaluation_sets
from digits_demo.experts import Expert
from digits_demo.settings import Settings, quick
from safetensors.numpy import load_file

SCRIPT = Path(__file__).parents[2] / "examples" / "digits" / "run.py"
SETTINGS = quick(Settings(seeds=(0,)))


@pytest.fixture(scope="module")
def folders(quick_run):
    """One quick run through the installed command: its work folder, output and printed text."""
    return quick_run


def weights(folder):
    return load_file(folder / "model.safetensors")


def trained(work, domain=None, rank=None):
    return Expert(0, domain, rank).folder(SETTINGS, work)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=2e-6, err_msg=name)


def test_the_run_leaves_a_picture_a_table_and_results(folders):
    _, out, printed = folders
    assert sorted(path.name for path in out.iterdir()) == [
        "digits.json", "digits.md", "digits.png",
    ]  # fmt: skip
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    collected = json.loads((out / "digits.json").read_text())
    titles = [row["title"] for row in collected["summary"]]
    assert titles == [
        "Base", "Experts, full", "Experts, LoRA r=4", "Best single expert", "Uniform soup",
        "Task arithmetic", "TIES", "Breadcrumbs", "Task arithmetic, LoRA r=4", "TIES, LoRA r=4",
    ]  # fmt: skip
    assert all(title in printed for title in titles)
    assert all(sentence in printed for sentence in collected["findings"])
    assert "trained 13 models" in printed


def test_experts_learn_their_domains_and_leave_the_base_behind(folders):
    _, out, _ = folders
    rows = {row["name"]: row for row in json.loads((out / "digits.json").read_text())["summary"]}
    assert rows["base"]["upright"]["mean"] > 90
    assert rows["experts-full"]["average"]["mean"] > rows["base"]["average"]["mean"] + 30
    assert rows["experts-lora4"]["average"]["mean"] > rows["base"]["average"]["mean"] + 30
    assert rows["experts-full"]["normalised"]["mean"] == 100


def test_the_soup_is_the_mean_of_the_experts(folders):
    work, _, _ = folders
    experts = [weights(trained(work, domain)) for domain in DOMAINS]
    mean = {name: np.mean([e[name] for e in experts], axis=0) for name in experts[0]}
    assert_close(weights(work / "merged" / "seed0" / "linear-full"), mean)


def test_task_arithmetic_adds_the_scaled_task_vectors(folders):
    work, _, _ = folders
    base = weights(trained(work))
    experts = [weights(trained(work, domain)) for domain in DOMAINS]
    for lam in SETTINGS.sum_grid:
        expected = {
            name: base[name] + float(lam) * sum(e[name] - base[name] for e in experts)
            for name in base
        }
        out = work / "merged" / "seed0" / "task_arithmetic-full" / f"lam={lam}"
        assert_close(weights(out), expected)


def test_merged_adapters_are_applied_to_the_base(folders):
    work, _, _ = folders
    expected = weights(trained(work))
    prefix, down = "base_model.model.", ".lora_A.weight"
    for domain in DOMAINS:
        lora = load_file(trained(work, domain, 4) / "adapter_model.safetensors")
        modules = [name.removesuffix(down) for name in lora if name.endswith(down)]
        assert len(modules) == 16
        for module in modules:
            update = 2 * lora[f"{module}.lora_B.weight"] @ lora[f"{module}{down}"]
            expected[f"{module.removeprefix(prefix)}.weight"] += np.float32(0.4) * update
    out = work / "merged" / "seed0" / "task_arithmetic-lora4" / "lam=0.4"
    assert_close(weights(out), expected)


def test_the_reported_accuracy_is_that_of_the_chosen_checkpoint(folders):
    work, out, _ = folders
    scores = json.loads((out / "digits.json").read_text())["scores"]["0"]
    merged = [score for score in scores if score["validation"] and score["chosen"].startswith("0")]
    assert [score["name"] for score in merged] == [
        "task_arithmetic-full", "ties-full", "breadcrumbs-full", "task_arithmetic-lora4",
        "ties-lora4",
    ]  # fmt: skip
    test, val = evaluation_sets(0, "test"), evaluation_sets(0, "val")
    for score in merged:
        folder = work / "merged" / "seed0" / score["name"]
        assert accuracies(load_model(folder / f"lam={score['chosen']}"), test) == score["test"]
        means = {
            lam: domain_mean(accuracies(load_model(folder / f"lam={lam}"), val))
            for lam in score["validation"]
        }
        assert score["validation"] == means
        assert score["validation"][score["chosen"]] == max(score["validation"].values())
