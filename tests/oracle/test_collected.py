"""Means by statistics against least squares and weighted means in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mergebench import merge_models
from tests.contract.assertions import assert_close
from tests.oracle.test_against_oracle import CASES

SHAPES = {"layers.0.w": (4, 6), "layers.1.w": (5, 3), "conv": (3, 2, 2, 1), "b": (4,)}


def models_of(random: np.random.Generator, count: int) -> list[dict[str, np.ndarray]]:
    """Models of matrices, a kernel and a vector."""
    return [{n: random.normal(size=s) for n, s in SHAPES.items()} for _ in range(count)]


def flat(array: np.ndarray) -> np.ndarray:
    """A weight as out × in."""
    return array.reshape(array.shape[0], -1)


@given(data=st.data())
@CASES
def test_fisher_is_a_weighted_mean(data: st.DataObject) -> None:
    """Entry by entry, by Fishers over their lengths, with a floor."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count = data.draw(st.integers(1, 4))
    models = models_of(random, count)
    fishers = [{n: random.normal(size=s) ** 4 for n, s in SHAPES.items()} for _ in models]
    weights = [float(w) for w in random.uniform(0.1, 2, count)]
    normalize, floor = data.draw(st.booleans()), data.draw(st.sampled_from([0.0, 1e-6, 0.1]))
    pairs = list(zip(models, weights, strict=True))
    got = merge_models(pairs, method="fisher", statistics=fishers, normalize=normalize, floor=floor)
    lengths = [
        np.sqrt(sum((f**2).sum() for f in each.values())) if normalize else 1.0 for each in fishers
    ]
    expected = {}
    for name in SHAPES:
        shares = [
            w * np.maximum(f[name] / length, floor)
            for w, f, length in zip(weights, fishers, lengths, strict=True)
        ]
        terms = [s * m[name] for s, m in zip(shares, models, strict=True)]
        expected[name] = sum(terms) / sum(shares)
    assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("method", ["regmean", "regmean_pp"])
@given(data=st.data())
@CASES
def test_regmean_is_least_squares(method: str, data: st.DataObject) -> None:
    """``min_W Σ w_i ‖X_i W_iᵀ - X_i Wᵀ‖²`` at alpha 1, solved over all inputs at once.

    With fewer inputs than columns, of all solutions the one nearest to the mean, every column in
    units of its inputs.
    """
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count, tokens = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 9]))
    models = models_of(random, count)
    inputs = [
        {n: random.normal(size=(tokens, flat(np.empty(s)).shape[1])) for n, s in SHAPES.items()}
        for _ in models
    ]
    grams = [{n: x.T @ x for n, x in each.items() if n != "b"} for each in inputs]
    weights = [float(w) for w in random.uniform(0.2, 2, count)]
    pairs = list(zip(models, weights, strict=True))
    got = merge_models(pairs, method=method, statistics=grams, alpha=1.0)
    expected = {}
    for name, shape in SHAPES.items():
        mean = sum(w * m[name] for w, m in pairs_of(weights, models)) / sum(weights)
        if name == "b":
            expected[name] = mean
            continue
        rows = np.concatenate([np.sqrt(w) * x[name] for w, x in pairs_of(weights, inputs)])
        away = np.concatenate(
            [
                np.sqrt(w) * x[name] @ (flat(m[name]) - flat(mean)).T
                for w, x, m in zip(weights, inputs, models, strict=True)
            ]
        )
        spread = np.sqrt((rows**2).sum(axis=0))
        sizes = np.linalg.svd(rows / spread, compute_uv=False)
        # What has hardly any energy may be taken for absent.
        assume(not ((sizes > 1e-9 * sizes[0]) & (sizes < 3e-3 * sizes[0])).any())
        step = np.linalg.lstsq(rows / spread, away, rcond=1e-9)[0].T / spread
        expected[name] = (flat(mean) + step).reshape(shape)
    assert_close(got, expected, 1e-6)


def pairs_of(weights: list[float], tables: list[Any]) -> list[tuple[float, Any]]:
    """Weights beside what they are of."""
    return list(zip(weights, tables, strict=True))


@given(data=st.data())
@CASES
def test_shrunk_grams_solve_their_normal_equations(data: st.DataObject) -> None:
    """``W ΣĜ = Σ W_i Ĝ_i`` with the entries beside the diagonal of G times alpha."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    alpha = data.draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))
    models = models_of(random, 3)
    grams = []
    for _ in models:
        drawn = {n: random.normal(size=(20, flat(np.empty(s)).shape[1])) for n, s in SHAPES.items()}
        grams.append({n: x.T @ x for n, x in drawn.items() if n != "b"})
    got = merge_models(models, method="regmean", statistics=grams, alpha=alpha)
    for name in set(SHAPES) - {"b"}:
        own = [alpha * g[name] + (1 - alpha) * np.diag(np.diag(g[name])) for g in grams]
        left = flat(got[name]) @ sum(own)
        right = sum(flat(m[name]) @ g for m, g in zip(models, own, strict=True))
        np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9)
