"""Adapters as people publish them: what the libraries never write, or write and nobody expects.

Each oddity, and the test that has it as a fixture, stands in ``tests/adapters/README.md``.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.adapters import factors, product, save_peft
from tests.helpers.compare import assert_close
from tests.helpers.files import F32, Array, listing, read
from tests.helpers.models import base_model, save_folder
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.updates import update_of

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "adapters" / "README.md"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def head(classes: int) -> Array:
    """A task head."""
    return np.random.default_rng(classes).standard_normal((classes, 16)).astype(F32)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, two adapters with heads of different size, and two of ranks 8 and 16."""
    save_folder(tmp_path / "base", base_model())
    save_folder(tmp_path / "headed", {**base_model(), "score.weight": head(3)})
    save_peft(tmp_path / "three", factors(1), extra={"score.weight": head(3)})
    save_peft(tmp_path / "five", factors(2), extra={"score.weight": head(5)})
    absent = ["q_proj", "up_proj", "c_attn", "wte"]
    save_peft(tmp_path / "r8", factors(3, rank=8), target_modules=absent)
    wanted = r"model\.layers\.\d+\.(self_attn\.q|mlp\.up)_proj"
    save_peft(tmp_path / "r16", factors(4, rank=16), target_modules=wanted)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ("score.weight", "three", "five")),
        (["-b", "base"], ("score.weight",)),
        (["-b", "headed"], ("score.weight: headed is 3×16, five is 5×16", "--on-mismatch")),
    ],
)
def test_heads_of_different_size(place: Path, options: list[str], words: tuple[str, ...]) -> None:
    """One base, classifiers of 3 and of 5 classes: refused by name, and merged without them."""
    before = listing(place)
    command = ("merge", "three", "five", "-m", "task_arithmetic", *options, "-o", "out")
    assert_refused(call(*command, cwd=place), *words)
    assert listing(place) == before

    assert_done(call(*command, "--exclude", "score*", "--as", "delta", cwd=place))
    updates = [product(factors(seed), 2.0) for seed in (1, 2)]
    wanted = {name: updates[0][name] + updates[1][name] for name in updates[0]}
    got = {name: array for name, array in read(place / "out").items() if array.any()}
    assert_close(got, wanted)


def test_ranks_and_targets(place: Path) -> None:
    """Ranks 8 and 16, one with targets that the base lacks, one with a pattern for targets."""
    assert_done(call("merge", "r8", "r16", "-m", "task_arithmetic", "-o", "out", cwd=place))
    updates = [product(factors(3, rank=8), 1.0), product(factors(4, rank=16), 0.5)]
    wanted = {name: updates[0][name] + updates[1][name] for name in updates[0]}
    assert_close(update_of(place / "out"), wanted)
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(name.removesuffix(".weight") for name in wanted)


def test_pickled_only(place: Path) -> None:
    """A folder with adapter_model.bin alone is the same adapter."""
    shutil.copytree(place / "r8", place / "pickled")
    stored = place / "pickled" / "adapter_model.safetensors"
    torch.save(load_file(stored), stored.with_suffix(".bin"))
    stored.unlink()
    for first, out in (("r8", "one"), ("pickled", "other")):
        assert_done(call("merge", first, "r16", "-m", "linear", "-o", out, cwd=place))
    one, other = (place / out / "adapter_model.safetensors" for out in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("broken", ["adapter_model.safetensors", "adapter_config.json"])
def test_pointers_of_git_lfs(place: Path, broken: str) -> None:
    """Cloned without git-lfs: the file that is a pointer is named, and what fetches it."""
    (place / "r8" / broken).write_text(LFS)
    assert_refused(
        call("merge", "r8", "r16", "-m", "linear", "-o", "out", cwd=place),
        f"r8/{broken}: is a Git-LFS pointer", "git lfs pull",
    )  # fmt: skip


def test_tests_of_oddities_exist() -> None:
    """Every test that the table names is there."""
    named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", TABLE.read_text())
    assert len(named) >= 9
    for path, test in named:
        assert f"def {test}(" in (ROOT / "tests" / path).read_text(), f"{path}::{test}"
