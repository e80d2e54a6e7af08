"""Worked numbers of LARV, and what it does to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergebench import merge_models
from mergebench.merge.ops.larv import conflict, effective_rank, gate
from tests.helpers.adapters import factors, save_peft
from tests.helpers.running import assert_done, assert_refused, call

Array = np.ndarray[Any, np.dtype[Any]]


def test_conflict() -> None:
    """Beside the identity: none for symmetric updates, 1 for a corner, √2 for a rotation."""
    one = np.eye(2)
    assert conflict(one, np.array([[2.0, 3], [3, -1]])) == 0
    assert conflict(one, np.array([[0.0, 1], [0, 0]])) == pytest.approx(1)
    assert conflict(one, np.array([[0.0, 1], [-1, 0]])) == pytest.approx(np.sqrt(2))
    assert conflict(one, np.zeros((2, 2))) == 0


def test_effective_rank() -> None:
    """The identity has 2, a single direction 1: e = 2."""
    assert effective_rank(np.eye(2)) == pytest.approx(2)
    assert effective_rank(np.diag([1.0, 0])) == pytest.approx(1)
    assert effective_rank(np.zeros((2, 3))) == 0
    shares = np.array([0.8, 0.2])
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(np.diag([2.0, 1])) == pytest.approx(expected)


def test_gate() -> None:
    """Between a half and three halves."""
    assert gate(np.array(0.5)) == pytest.approx(0.5474, abs=1e-4)
    assert gate(np.array(2.0)) == pytest.approx(1.4975, abs=1e-4)
    assert gate(np.array(1.0)) == 1


def scores(base: dict[str, Array], tau: dict[str, Array], blocks: int) -> Array:
    """The score of each block, written out."""

    def rank(matrix: Array) -> float:
        shares = np.linalg.svd(matrix, compute_uv=False) ** 2
        shares = shares[shares > 0] / shares.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    ratios, conflicts = [], []
    for block in range(blocks):
        names = [n for n in base if f"layers.{block}." in n and base[n].ndim == 2]
        ratios.append(np.mean([rank(base[n]) / rank(tau[n]) for n in names]))
        each = []
        for n in names:
            w, d = base[n], tau[n]
            apart = np.linalg.norm(w @ d.T - d @ w.T) + np.linalg.norm(w.T @ d - d.T @ w)
            each.append(apart / 2 / np.linalg.norm(w) / np.linalg.norm(d))
        conflicts.append(np.mean(each))
    standard = (np.array(conflicts) - np.mean(conflicts)) / np.std(conflicts)
    depth = np.arange(1, blocks + 1) / blocks
    return np.array(ratios) * np.sqrt(depth) / (1 + np.log1p(np.exp(standard)))


@pytest.mark.parametrize("form", ["continuous", "tiers"])
def test_a_model(form: str) -> None:
    """Blocks have factors of their own; what lies outside stays; vectors go with their block."""
    random = np.random.default_rng(0)
    blocks = 4
    shapes = {"model.embed_tokens.weight": (6, 5), "model.norm.weight": (5,)}
    for block in range(blocks):
        shapes |= {
            f"model.layers.{block}.q.weight": (5, 5),
            f"model.layers.{block}.up.weight": (8, 5),
            f"model.layers.{block}.norm.weight": (5,),
        }
    base = {name: random.normal(size=shape) for name, shape in shapes.items()}
    tau = {name: random.normal(size=shape) for name, shape in shapes.items()}
    for block in range(blocks):
        tau[f"model.layers.{block}.up.weight"] *= 10.0 ** -np.arange(5) if block == 1 else 1
    model = {name: base[name] + tau[name] for name in shapes}

    got = merge_models(
        [model], base=base, method="task_arithmetic", then=[f"larv:form={form},low=0.25"]
    )

    found = scores(base, tau, blocks)
    factors = 1 + np.tanh(3 * (found - 1)) / 2
    if form == "tiers":
        order = np.argsort(found)
        factors = np.empty(blocks)
        factors[order] = [0.25, 0.25, 0.75, 1.0]
    for name in shapes:
        place = name.split(".")[2] if "layers" in name else None
        factor = 1.0 if place is None else factors[int(place)]
        expected = base[name] + factor * tau[name]
        np.testing.assert_allclose(got[name], expected, rtol=1e-10, atol=1e-12, err_msg=name)


def test_nothing_to_scale() -> None:
    """Models without blocks, or that have not moved, stay as they are."""
    base = {"weight": np.eye(3), "layers.0.weight": np.eye(3)}
    moved = {"weight": np.eye(3) * 2, "layers.0.weight": np.eye(3)}
    got = merge_models([moved], base=base, method="task_arithmetic", then=["larv"])
    for name, array in moved.items():
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("moved", [0, 2])
def test_depth_counts_blocks_that_stayed(moved: int) -> None:
    """The depth of a block is that in its stack, where no other block has moved too."""
    names = [f"model.layers.{block}.w.weight" for block in range(4)]
    base = {name: np.eye(2) for name in names}
    tuned = {**base, names[moved]: np.eye(2) + np.diag([1.0, 0.0])}
    got = merge_models([tuned], base=base, method="task_arithmetic", then=["larv"])
    # e = 2 / 1, c = 0 and alone: 2 √d / (1 + log 2).
    score = 2 * ((moved + 1) / 4) ** 0.5 / (1 + np.log(2.0))
    factor = 1 + np.tanh(3 * (score - 1)) / 2
    np.testing.assert_allclose(got[names[moved]], np.eye(2) + np.diag([factor, 0.0]), rtol=1e-12)


def test_conflicts_that_are_equal_but_for_rounding() -> None:
    """The same update at other sizes in every block: scores differ by depth alone, ĉ is 0."""
    random = np.random.default_rng(0)
    weight, update = random.normal(size=(2, 6, 5))
    names = [f"model.layers.{block}.w.weight" for block in range(4)]
    base = {name: weight.copy() for name in names}
    tuned = {
        name: weight + size * update
        for name, size in zip(names, (0.1, 0.07, 0.3, 0.011), strict=True)
    }
    plain = merge_models([tuned], base=base, method="task_arithmetic")
    got = merge_models([tuned], base=base, method="task_arithmetic", then=["larv"])

    def rank(matrix: np.ndarray) -> float:
        shares = np.linalg.svd(matrix, compute_uv=False) ** 2
        shares /= shares.sum()
        return float(np.exp(-np.sum(shares * np.log(shares))))

    for block, name in enumerate(names):
        score = rank(weight) / rank(update) * ((block + 1) / 4) ** 0.5 / (1 + np.log(2.0))
        factor = 1 + np.tanh(3 * (score - 1)) / 2
        moved = (got[name] - weight) / (plain[name] - weight)
        assert np.abs(moved - factor).max() < 1e-6


def test_files_and_command_line(tmp_path: Path) -> None:
    """The same from files, for an adapter on its base; without a base it is refused."""
    random = np.random.default_rng(0)
    made = factors(1, 4)
    save_peft(tmp_path / "lora", made, alpha=8.0)
    base = {
        f"{module}.weight": random.normal(size=(B.shape[0], A.shape[1])).astype(np.float32)
        for module, (B, A) in made.items()
    }
    save_file(base, tmp_path / "base.safetensors")
    common = ("merge", "lora", "-m", "task_arithmetic", "--then", "larv:form=tiers,high=2")
    assert_done(call(*common, "-b", "base.safetensors", "-o", "out.safetensors", cwd=tmp_path))
    got = load_file(tmp_path / "out.safetensors")
    update = {name: (got[name] - base[name]) for name in base}
    ratios = set()
    for module, (B, A) in made.items():
        whole = 2.0 * B.astype(float) @ A.astype(float)
        ratio = float(np.sum(update[f"{module}.weight"] * whole) / np.sum(whole * whole))
        ratios.add(round(ratio, 3))
    assert ratios <= {0.5, 0.75, 2.0}
    assert len(ratios) > 1
    assert_refused(call(*common, "-o", "none.safetensors", cwd=tmp_path), "--base")
    assert not (tmp_path / "none.safetensors").exists()
    for bad in ("larv:form=deep", "larv:low=x", "larv:tiers=3"):
        assert_refused(call(*common[:4], "--then", bad, "-b", "base.safetensors", cwd=tmp_path))
    plan = json.loads(
        assert_done(call("plan", *common[1:], "-b", "base.safetensors", "--json", cwd=tmp_path)).out
    )
    assert plan["passes"] == 2
