"""Modules that adapters hold in full: kept, merged, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.adapters import factors, product, save_peft
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.files import F32, Array, listing, read
from tests.helpers.models import added, base_model, fine_tune, save_folder
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.updates import update_of

STORED = "base_model.model.score.weight"


def head(seed: int) -> Array:
    """A task head of three classes."""
    return np.random.default_rng(seed).standard_normal((3, 16)).astype(F32)


def adapter(path: Path, seed: int, score: Array) -> Path:
    """An adapter on the small model with a head of its own."""
    return save_peft(path, factors(seed), extra={"score.weight": score})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two adapters with one head, a third with another, a base without it and one with it."""
    adapter(tmp_path / "a", 1, head(1))
    adapter(tmp_path / "b", 2, head(1))
    adapter(tmp_path / "c", 3, head(3))
    save_peft(tmp_path / "plain", factors(4))
    save_folder(tmp_path / "base", base_model())
    save_folder(tmp_path / "headed", {**base_model(), "score.weight": head(0)})
    return tmp_path


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_equal_modules_are_kept(place: Path, method: str) -> None:
    """A head that all inputs share is in the merged adapter, declared as PEFT wants it."""
    assert_done(call("merge", "a", "b", "-m", method, "-o", "out", cwd=place))

    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"]
    assert "score" not in config["target_modules"]
    assert_same({"": read(place / "out")[STORED]}, {"": head(1)})


def test_different_modules_are_refused(place: Path) -> None:
    """Heads that differ cannot be averaged without a base; the error names the choices."""
    before = listing(place)

    ran = call("merge", "a", "c", "-m", "ties", cwd=place)

    assert_refused(ran, "score.weight", "a and c" if "a and c" in ran.err else "c and a", "--base")
    assert listing(place) == before


def test_module_that_the_base_has_is_merged(place: Path) -> None:
    """With a base that has the head, each adapter's head is a difference like any other."""
    common = ("-b", "headed", "-m", "task_arithmetic", "-o", "out")
    assert_done(call("merge", "a:0.5", "c:0.25", *common, cwd=place))

    updates = [product(factors(seed), 2.0) for seed in (1, 3)]
    deltas = {name: 0.5 * updates[0][name] + 0.25 * updates[1][name] for name in updates[0]}
    start = head(0).astype(np.float64)
    deltas["score.weight"] = 0.5 * (head(1) - start) + 0.25 * (head(3) - start)
    base = {**base_model(), "score.weight": head(0)}
    assert_close(read(place / "out"), added(base, deltas))


def test_adapter_without_the_module_adds_nothing_to_it(place: Path) -> None:
    """An input that lacks the head leaves it to the others."""
    common = ("-b", "headed", "-m", "task_arithmetic", "-o", "out")
    assert_done(call("merge", "a", "plain", *common, cwd=place))

    assert_close({"": read(place / "out")["score.weight"]}, {"": head(1)})


def test_module_that_the_base_lacks_is_added(place: Path) -> None:
    """Equal heads are written beside the merged weights of a base that has none."""
    for models in (("a", "b", "-b", "base"), ("base+a", "base+b", "-b", "base")):
        for method in ("linear", "ties"):
            assert_done(call("merge", *models, "-m", method, "-o", "out", "-f", cwd=place))
            merged = read(place / "out")
            assert_same({"": merged.pop("score.weight")}, {"": head(1)})
            assert sorted(merged) == sorted(base_model())
            ran = call("merge", "a", "c", "-b", "base", "-m", method, cwd=place)
            assert_refused(ran, "score.weight", "task heads are best kept apart")


def test_heads_on_fine_tuned_checkpoints(place: Path) -> None:
    """An adapter with a head on a fine-tune brings the head along, with or without a base."""
    save_folder(place / "ft", fine_tune(base_model(), 1))
    for extra in (("-m", "linear"), ("-m", "ties", "-b", "base")):
        assert_done(call("merge", "ft+a", "base+b", *extra, "-o", "out", "-f", cwd=place))
        assert_same({"": read(place / "out")["score.weight"]}, {"": head(1)})


def test_equal_modules_stay_in_an_adapter_with_a_base(place: Path) -> None:
    """With --base and --as lora an equal head is kept in full, even if the base has one."""
    common = ("-b", "headed", "--as", "lora", "-m", "task_arithmetic", "-o", "out")
    assert_done(call("merge", "a", "b", *common, cwd=place))

    assert_same({"": read(place / "out")[STORED]}, {"": head(1)})
    updates = [product(factors(seed), 2.0) for seed in (1, 2)]
    expected = {name: updates[0][name] + updates[1][name] for name in updates[0]}
    assert_close(update_of(place / "out"), expected)
    refused = call("merge", "a", "c", *common[:-1], "other", cwd=place)
    assert_refused(refused, "score.weight", "--as model", "--as delta")


def test_modules_survive_as_a_task_vector(place: Path) -> None:
    """In a saved task vector a kept head is a replacement, and a model gets it back."""
    assert_done(call("merge", "a", "b", "--as", "delta", "-o", "tau.safetensors", cwd=place))
    assert_done(call("merge", "tau.safetensors", "-b", "base", "-o", "model", cwd=place))

    updates = [product(factors(seed), 2.0) for seed in (1, 2)]
    mean = {name: (updates[0][name] + updates[1][name]) / 2 for name in updates[0]}
    assert_close(read(place / "model"), {**added(base_model(), mean), "score.weight": head(1)})
