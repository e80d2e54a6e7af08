"""WIDEN against its equations written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergebench import merge_models

Array = np.ndarray[Any, np.dtype[Any]]


def ranks(values: Array) -> Array:
    """How many come before, in a stable ascending sort."""
    found = np.empty(len(values))
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: (values[i], i))):
        found[index] = place
    return found


def scores(divergences: Array, ratio: float, calibration: float) -> Array:
    """Importances, (models, columns)."""
    within = np.array([ranks(row) for row in divergences])
    soft = np.exp(within / within.shape[1]) / np.exp(within / within.shape[1]).sum(axis=0)
    bars = ratio * within.mean(axis=1, keepdims=True)
    return np.where(within > bars, calibration, soft)


def widen(base: Array, tuned: list[Array], ratio: float, calibration: float) -> Array:
    """The merged matrix whose columns are axis 1, or vector."""
    tau = np.array([each - base for each in tuned])
    if base.ndim == 1:
        moved = np.abs(tau)
        soft = np.exp(moved) / np.exp(moved).sum(axis=0)
        bars = ratio * moved.mean(axis=1, keepdims=True)
        return base + (np.where(moved > bars, calibration, soft) * tau).sum(axis=0)
    length = np.linalg.norm(base, axis=0)
    lengths = np.array([np.linalg.norm(each, axis=0) for each in tuned])
    cosines = np.array(
        [(base * each).sum(axis=0) / length / own for each, own in zip(tuned, lengths, strict=True)]
    )
    magnitude = scores(np.abs(lengths - length), ratio, calibration)
    direction = scores(1 - cosines, ratio, calibration)
    return base + (((magnitude + direction) / 2)[:, None, :] * tau).sum(axis=0)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("calibration", [1.0, 0.4])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_equations(ratio: float, calibration: float, count: int) -> None:
    """Matrices by input feature, embeddings by token, kernels, vectors."""
    random = np.random.default_rng(count)
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (7, 5),
        "model.embed_tokens.weight": (9, 4),
        "model.layers.0.conv.weight": (4, 3, 2, 2),
        "model.norm.weight": (11,),
        "model.layers.0.mlp.up_proj.bias": (7,),
    }
    base = {name: random.normal(size=shape) for name, shape in shapes.items()}
    models = [
        {name: each + 0.3 * random.normal(size=each.shape) for name, each in base.items()}
        for _ in range(count)
    ]

    got = merge_models(
        models, base=base, method="widen", ratio=ratio, calibration=calibration, lam=1.0
    )

    for name, own in base.items():
        tuned = [model[name] for model in models]
        if "embed" in name:
            expected = widen(own.T, [each.T for each in tuned], ratio, calibration).T
        elif own.ndim > 2:
            flat = [each.reshape(len(each), -1) for each in (own, *tuned)]
            expected = widen(flat[0], flat[1:], ratio, calibration).reshape(own.shape)
        else:
            expected = widen(own, tuned, ratio, calibration)
        np.testing.assert_allclose(got[name], expected, rtol=1e-12, atol=1e-12, err_msg=name)


def test_what_changed_ranks_highest() -> None:
    """One column that only one model has changed is taken over in full, another's too."""
    base = {"layers.0.weight": np.ones((3, 4))}
    one, two = (np.ones((3, 4)) for _ in range(2))
    one[:, 1] = [2.0, 1.0, 0.5]
    two[:, 2] = [1.0, 3.0, 0.5]

    got = merge_models(
        [{"layers.0.weight": one}, {"layers.0.weight": two}], base=base, method="widen"
    )

    expected = np.ones((3, 4))
    expected[:, 1], expected[:, 2] = one[:, 1], two[:, 2]
    np.testing.assert_allclose(got["layers.0.weight"], expected, rtol=1e-12)


def test_a_common_change_counts_twice() -> None:
    """Two models with the same task vector: columns above the mean add up, others are averaged."""
    random = np.random.default_rng(0)
    base = {"layers.0.weight": random.normal(size=(5, 6))}
    tau = 0.1 * random.normal(size=(5, 6)) * np.array([1, 2, 3, 4, 50, 60.0])
    model = {"layers.0.weight": base["layers.0.weight"] + tau}

    got = merge_models([model, model], base=base, method="widen")["layers.0.weight"]

    shares = (got - base["layers.0.weight"])[0] / tau[0]
    assert np.all((np.isclose(shares, 1)) | (np.isclose(shares, 1.5)) | (np.isclose(shares, 2)))
    assert np.isclose(shares[4:], 2).all()
