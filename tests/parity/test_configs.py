"""Configurations of mergekit run by `mergebench run`, against what mergekit made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.running import assert_done, call
from tests.parity.configs import CONFIGS, STORED, build_all, sides, written

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yml"))
#: Roundings of float32 between inputs and result, in units of the magnitudes that are added up:
#: differences, products, sums, divisions, and the norms of SLERP.
ROUNDINGS = 8 * 2.0**-24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models in a folder, and the configurations beside them."""
    folder = tmp_path_factory.mktemp("models")
    build_all(folder)
    for path in CONFIGS.glob("*.yml"):
        (folder / path.name).write_text(path.read_text())
    return folder


def classes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    """How many entries are equal, differ by rounding, and differ otherwise."""
    assert {n: (a.shape, a.dtype) for n, a in ours.items()} == {
        n: (a.shape, a.dtype) for n, a in theirs.items()
    }
    counts = {"equal": 0, "rounding": 0, "unexplained": 0}
    for name, array in theirs.items():
        mine, other = ours[name].astype(np.float64), array.astype(np.float64)
        # Weights reach 1.5 in magnitude, and up to three models are added with weights up to 1.5.
        slack = ROUNDINGS * (4.0 + np.abs(other))
        if array.dtype == ml_dtypes.bfloat16:
            slack = slack + np.abs(other) * 2.0**-7
        equal = mine == other
        near = np.abs(mine - other) <= slack
        counts["equal"] += int(equal.sum())
        counts["rounding"] += int((near & ~equal).sum())
        counts["unexplained"] += int((~near).sum())
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_the_same_file_gives_the_same_model(models: Path, name: str) -> None:
    """Every entry is equal or differs by rounding; so do config, vocabulary and template."""
    assert_done(call("run", f"{name}.yml", "-o", f"out-{name}", cwd=models))
    out = models / f"out-{name}"
    counts = classes(written(out), load_file(STORED / f"{name}.safetensors"))
    assert counts["unexplained"] == 0, counts
    recorded = json.loads((STORED / "sides.json").read_text())["sides"][name]
    assert sides(out) == recorded


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_recipe_gives_the_same_bytes(models: Path, name: str) -> None:
    """The output holds a recipe of ours, which needs no mergekit configuration."""
    assert_done(call("run", f"{name}.yml", "-o", f"one-{name}", cwd=models))
    assert_done(call("run", f"one-{name}", "-o", f"two-{name}", cwd=models))
    printed = assert_done(call("run", f"{name}.yml", "--print-recipe", cwd=models)).out
    (models / "own.yaml").write_text(printed)
    assert_done(call("run", "own.yaml", "-o", f"three-{name}", cwd=models))
    one, two, three = (
        (models / f"{place}-{name}/model.safetensors").read_bytes()
        for place in ("one", "two", "three")
    )
    assert one == two == three


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gradients-filters", ("value: [1, -0.5]", "value: [1, -0.49]")),
        ("gradients-filters", ("layers.1", "layers.2")),
        ("density-by-model", ("density: 0.33", "density: 0.34")),
        ("breadcrumbs-by-model", ("gamma: 0.02", "gamma: 0.05")),
        ("slices-slerp", ("base_model: ft-b", "base_model: ft-a")),
        ("slices-levels", ("[0.3, 0.8]", "[0.31, 0.8]")),
        ("slices-with-base", ("[1, 4]", "[0, 3]")),
        ("passthrough-stack", ("model: ft-c", "model: ft-b")),
        ("out-dtype", ("weight: 0.5", "weight: 0.6")),
        ("base-as-input", ("base_model: base\n", "base_model: ft-c\n")),
        ("tokenizer-union", ("weight: 0.75", "weight: 0.76")),
        ("tokenizer-base", ("weight: 0.25", "weight: 0.26")),
        ("ties-tokenizer-union", ("density: 0.7", "density: 0.71")),
        ("slerp-tokenizer-base", ("embed_tokens, value: 0.4", "embed_tokens, value: 0.41")),
        ("dare-dense-tokenizer", ("lambda: 1.2", "lambda: 1.21")),
        ("breadcrumbs-ties-slices", ("gamma: 0.05", "gamma: 0.06")),
    ],
)
def test_a_wrong_rule_is_noticed(models: Path, name: str, change: tuple[str, str]) -> None:
    """The comparison fails on another configuration, so it can fail."""
    text = (CONFIGS / f"{name}.yml").read_text()
    assert change[0] in text
    (models / "wrong.yml").write_text(text.replace(*change))
    assert_done(call("run", "wrong.yml", "-o", "wrong", "-f", cwd=models))
    counts = classes(written(models / "wrong"), load_file(STORED / f"{name}.safetensors"))
    assert counts["unexplained"] > 0
