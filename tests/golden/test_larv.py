"""Worked numbers of LARV, and what it does to a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergebench import merge_models
from mergebench.merge.ops.larv import conflict, effective_rank, gate

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
