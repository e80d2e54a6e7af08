"""Fisher merging and RegMean, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergebench import apply, merge_models, methods
from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.site import Site
from mergebench.merge.at import At


def merged(method: str, thetas: Any, statistics: Any, **params: Any) -> list[float]:
    """The weights of a layer with one output, or a vector."""
    models = [{"w": np.asarray(theta, np.float64)} for theta in thetas]
    held = [{"w": np.asarray(each, np.float64)} for each in statistics]
    found = merge_models(models, method=method, statistics=held, **params)["w"]
    return [float(each) for each in found.reshape(-1)]


PLAIN: dict[str, Any] = {"floor": 0.0, "normalize": False}
F = [[1.0, 3.0], [3.0, 4.0]]
ZERO_FOUR = [[0.0, 0.0], [4.0, 4.0]]


def test_equal_fishers_give_the_mean() -> None:
    """Whatever their common value is, the mean of the weights."""
    assert merged("fisher", ZERO_FOUR, [[7.0, 0.5]] * 2, **PLAIN) == [2.0, 2.0]
    assert merged("fisher", [[0.0], [4.0]], [[1.0], [3.0]], **PLAIN) == [3.0]


def test_fishers_as_they_are_and_normalised() -> None:
    """Divided by its length, a model with larger gradients no longer dominates."""
    assert merged("fisher", ZERO_FOUR, F, **PLAIN) == pytest.approx([3.0, 16 / 7], abs=1e-12)
    expected = [4 * (f / 5) / (f / 5 + e / np.sqrt(10)) for e, f in zip(*F, strict=True)]
    assert expected == pytest.approx([2.6194, 1.82995], abs=1e-4)
    assert merged("fisher", ZERO_FOUR, F) == pytest.approx(expected, abs=1e-12)
    assert merged("fisher", ZERO_FOUR, F, compat="official") == pytest.approx(expected, abs=1e-12)


def test_lengths_are_those_of_the_whole_model() -> None:
    """F of (3) and (4) in two tensors have length 5 together, not 3 and 4."""
    models = [{"a": np.zeros(1), "b": np.zeros(1)}, {"a": np.ones(1), "b": np.ones(1)}]
    held = [{"a": np.array([3.0]), "b": np.array([4.0])}, {"a": np.array([1.0]), "b": np.zeros(1)}]
    found = merge_models(models, method="fisher", statistics=held, floor=0.0)
    assert float(found["a"][0]) == pytest.approx(1 / (1 + 3 / 5))
    assert float(found["b"][0]) == 0.0


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # No data care for the first entry: the mean, whether by the floor or by 0/0.
        (PLAIN, [2.0, 4.0]),
        ({"floor": 0.25, "normalize": False}, [2.0, 4 * 2 / 2.25]),
        # Lengths 0 and 2: what has no length is not divided.
        ({"floor": 0.25}, [2.0, 4 * 1 / 1.25]),
        ({"floor": 0.5, "floor_at": "raw"}, [4 * 0.25 / 0.75, 4 * 1 / 1.5]),
        ({"floor": 0.5, "favor": "first", "normalize": False}, [0.0, 4 * 2 / 2.5]),
    ],
)
def test_floors(params: dict[str, Any], expected: list[float]) -> None:
    """The least F of an entry: of all models or the first, divided by lengths or as collected."""
    found = merged("fisher", ZERO_FOUR, [[0.0, 0.0], [0.0, 2.0]], **params)
    assert found == pytest.approx(expected, abs=1e-12)


def test_weights_count_beside_fishers() -> None:
    """θ = Σ w F θ / Σ w F; a mean by statistics takes no negative weight."""
    models = [({"w": np.zeros(1)}, 3.0), ({"w": np.ones(1)}, 1.0)]
    held = [{"w": np.ones(1)}, {"w": np.array([2.0])}]
    assert float(merge_models(models, method="fisher", statistics=held, **PLAIN)["w"][0]) == 0.4
    for method in ("fisher", "regmean"):
        with pytest.raises(ParameterError, match="must be at least 0"):
            merge_models([(m, -w) for m, w in models], method=method, statistics=held)


G = [[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 3.0]]]
UNITS = [[[1.0, 0.0]], [[0.0, 1.0]]]


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(1.0, [3 / 7, 5 / 7]), (0.9, [0.45736, 0.69767]), (0.0, [2 / 3, 0.6])],
)
@pytest.mark.parametrize("method", ["regmean", "regmean_pp"])
def test_regression_means(method: str, alpha: float, expected: list[float]) -> None:
    """``(ΣĜ)⁻¹ ΣĜW`` with the entries beside the diagonal times alpha."""
    assert merged(method, UNITS, G, alpha=alpha) == pytest.approx(expected, abs=1e-5)


def test_inputs_that_nobody_has_leave_the_mean() -> None:
    """Where all inputs are zero, and in directions that no data reach, weights are averaged."""
    eye = np.eye(2)
    assert merged("regmean", UNITS, [eye, eye]) == pytest.approx([0.5, 0.5])
    nothing = np.zeros((2, 2))
    assert merged("regmean", UNITS, [nothing, nothing]) == [0.5, 0.5]
    # Only x = (1, 1) was seen, by the first model alone: W1 x is kept, W x across it averaged.
    seen = np.ones((2, 2))
    found = merged("regmean", [[[1.0, 0.0]], [[0.0, 3.0]]], [seen, nothing], alpha=1.0)
    assert sum(found) == pytest.approx(1.0)
    assert found[0] - found[1] == pytest.approx(0.5 - 1.5)


def test_stored_input_by_output() -> None:
    """GPT-2's layers are stored the other way round, and merge to the transposed weights."""
    random = np.random.default_rng(0)
    thetas = [random.normal(size=(3, 2)) for _ in range(2)]
    grams = [x.T @ x for x in (random.normal(size=(9, 3)) for _ in range(2))]
    plain = merge_models(
        [{"w": theta.T.copy()} for theta in thetas],
        method="regmean",
        statistics=[{"w": g} for g in grams],
    )["w"]
    name = "h.0.attn.c_attn.weight"
    site = replace(Site(name, (3, 2)), transposed=True)
    at = At(site, 0, 6, (1.0, 1.0), collected=np.stack(grams))
    (op,) = methods["regmean"]()
    found = op.apply(np.stack([theta.reshape(-1) for theta in thetas]), at).reshape(3, 2)
    np.testing.assert_allclose(found, plain.T, rtol=1e-12)


def test_embeddings_by_their_counts() -> None:
    """Rows weigh by how often they were asked for; rows never asked for are averaged."""
    models = [np.zeros((3, 2)), np.ones((3, 2))]
    counts = [np.array([3.0, 0.0, 0.0]), np.array([1.0, 5.0, 0.0])]
    found = apply(methods["regmean"](), models, statistics=counts)
    np.testing.assert_allclose(found, [[0.25] * 2, [1.0] * 2, [0.5] * 2])


def test_squares_are_not_negative() -> None:
    """NaN, infinity and numbers below zero are refused, naming file, tensor and number."""
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(MergebenchError, match=r"statistics\[1\]: 1 numbers of 'w' are no sq"):
            merged("fisher", ZERO_FOUR, [[1.0, 2.0], [1.0, bad]])
        with pytest.raises(MergebenchError, match=r"'w' are no squares"):
            merged("regmean", UNITS, [np.eye(2), [[1.0, 0.0], [0.0, bad]]])


def test_statistics_are_of_every_model() -> None:
    """None, or those of some models, are refused by merges and by `apply`."""
    models = [{"w": np.zeros(1)}, {"w": np.ones(1)}]
    held = [{"w": np.ones(1)}]
    with pytest.raises(MergebenchError, match="fisher needs statistics of every model"):
        merge_models(models, method="fisher")
    with pytest.raises(MergebenchError, match="one for every model, expected 2, got 1"):
        merge_models(models, method="fisher", statistics=held)
    with pytest.raises(MergebenchError, match=r"models\[1\] has none"):
        merge_models(models, method="fisher", statistics=[*held, None])
    for given in (None, held):
        with pytest.raises(MergebenchError, match="the ops need statistics of every model"):
            apply(methods["fisher"](), models, statistics=given)


def test_what_nobody_has_statistics_of_is_averaged() -> None:
    """In merges as in `apply`; what only some have is refused."""
    models = [{"w": np.zeros(1), "v": np.zeros(1)}, {"w": np.ones(1), "v": np.ones(1)}]
    held = [{"w": np.ones(1)}, {"w": np.full(1, 3.0)}]
    for found in (
        merge_models(models, method="fisher", statistics=held, **PLAIN),
        apply(methods["fisher"](**PLAIN), models, statistics=held),
    ):
        assert {name: float(array[0]) for name, array in found.items()} == {"w": 0.75, "v": 0.5}
    with pytest.raises(MergebenchError, match=r"statistics\[1\]: has nothing for 'v', which"):
        merge_models(models, method="fisher", statistics=[{**held[0], "v": np.ones(1)}, held[1]])
