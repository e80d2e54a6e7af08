"""DARE, DELLA and magnitude pruning, worked out by hand for the masks that seeds give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mergebench import apply, merge_models
from mergebench.core.errors import ParameterError
from mergebench.merge.ops.drop import drop
from mergebench.merge.ops.magprune import magprune, probabilities

from .support import assert_exactly, merged

TAU = [1.0, 2.0, 3.0, 4.0]
HALF = [True, False, True, False]
DROPS = ["dare", "dare_linear", "dare_ties"]
RANKED = ["della", "della_linear"]


def seed_with(method: str, mask: list[bool], tau: list[float] = TAU, **params: Any) -> int:
    """The first seed that keeps just these entries."""
    for seed in range(1000):
        got = merged(method, tau, seed=seed, rescale="none", **params)
        if [entry != 0 for entry in got] == mask:
            return seed
    raise AssertionError("no seed gives that mask")


@pytest.mark.parametrize("method", DROPS)
@pytest.mark.parametrize(
    ("rescale", "expected"),
    [("density", [2, 0, 6, 0]), ("l1", [2.5, 0, 7.5, 0]), ("none", [1, 0, 3, 0])],
)
def test_what_stays_is_rescaled(method: str, rescale: str, expected: list[float]) -> None:
    """Of [1, 2, 3, 4] the mask [1, 0, 1, 0] leaves 4 of 10: half is dropped, 2.5 restores 10."""
    seed = seed_with(method, HALF, density=0.5)
    assert_exactly(merged(method, TAU, density=0.5, seed=seed, rescale=rescale), expected)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_mergekit_restores_the_norm(method: str) -> None:
    """The preset rescales by the L1 norm and keeps everything unless told otherwise."""
    seed = seed_with(method, HALF, density=0.5)
    got = merged(method, TAU, density=0.5, seed=seed, compat="mergekit-0.1.5")
    assert_exactly(got, [2.5, 0, 7.5, 0])
    assert_exactly(merged(method, TAU, compat="mergekit-0.1.5"), TAU)


@pytest.mark.parametrize("method", [*DROPS, *RANKED])
@pytest.mark.parametrize("rescale", [0, 1, 2])
def test_density_of_one_is_everything(method: str, rescale: int) -> None:
    """Nothing is dropped at p = 0, whatever the seed and the rescaling."""
    ways = ["l1", "none", "density" if method in DROPS else "probability"]
    for seed in range(5):
        assert_exactly(merged(method, TAU, density=1, seed=seed, rescale=ways[rescale]), TAU)


@pytest.mark.parametrize("method", [*DROPS, *RANKED])
def test_a_seed_is_a_mask(method: str) -> None:
    """A seed gives the same entries in any order of models, and another seed gives others."""
    models = [np.arange(1.0, 65.0).tolist(), np.arange(2.0, 66.0).tolist(), TAU * 16]
    first = merged(method, *models, density=0.5, seed=3)
    assert_exactly(merged(method, *models[::-1], density=0.5, seed=3), first)
    assert merged(method, *models, density=0.5, seed=4) != first


@pytest.mark.parametrize("method", ["dare", "dare_linear", "della_linear"])
def test_a_model_given_twice_is_drawn_for_twice(method: str) -> None:
    """Two copies lose other entries: a quarter is lost by both, and half by one of them."""
    tau = np.ones(4096).tolist()
    got = np.array(merged(method, tau, tau, density=0.5, rescale="none"))
    for number, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        spread = 5 * (share * (1 - share) / got.size) ** 0.5
        assert abs(float(np.mean(got == number)) - share) < spread


def test_tensors_of_one_shape_lose_other_entries() -> None:
    """The name of a tensor takes part in the draw, and the content of the model does."""
    tau = {name: np.ones(128, np.float32) for name in "ab"}
    base = {name: np.zeros(128, np.float32) for name in "ab"}
    got = merge_models([tau], base=base, method="dare")
    assert not np.array_equal(got["a"], got["b"])
    other = merge_models([{n: 2 * t for n, t in tau.items()}], base=base, method="dare")
    assert not np.array_equal(2 * got["a"], other["a"])


def moments(op: Callable[[int], Any], tau: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means and shares of non-zeros over 10^4 seeds."""
    runs = np.array([apply(op(seed), [np.array(tau)])[0] for seed in range(10_000)])
    return runs.mean(axis=0), (runs != 0).mean(axis=0)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_is_right_on_average(density: float) -> None:
    """The mean over 10^4 seeds is τ, to five standard deviations, and ρ of them keep an entry."""
    mean, kept = moments(lambda seed: drop(density, seed), TAU)
    spread = 5 * np.sqrt(density * (1 - density) / 10_000)
    assert np.all(np.abs(mean - TAU) < spread / density * np.array(TAU))
    assert np.all(np.abs(kept - density) < spread)


def test_della_is_right_on_average() -> None:
    """Each rank is kept with its own probability, and the mean over 10^4 seeds is τ."""
    chances = np.array([0.6, 0.4, 0.4 + 0.2 / 3, 0.4 + 0.4 / 3])
    tau = [4.0, -1.0, 2.0, -3.0]
    mean, kept = moments(lambda seed: magprune(0.5, 0.1, seed), tau)
    spread = 5 * np.sqrt(chances * (1 - chances) / 10_000)
    assert np.all(np.abs(mean - tau) < spread / chances * np.abs(tau))
    assert np.all(np.abs(kept - chances) < spread)


def test_probabilities_of_della() -> None:
    """Of four, ρ = .5, ε = .1 gives .4 to .6; the mean is ρ; a row of one has ρ."""
    assert np.allclose(probabilities(4, 0.5, 0.1), [0.4, 0.4 + 0.2 / 3, 0.4 + 0.4 / 3, 0.6])
    assert np.allclose(probabilities(5, 0.3, 0.1), [0.2, 0.25, 0.3, 0.35, 0.4])
    for row in (2, 3, 10, 777):
        assert np.isclose(probabilities(row, 0.7, 0.07).mean(), 0.7)
    assert probabilities(1, 0.7, 0.07).tolist() == [0.7]


@pytest.mark.parametrize(
    ("plain", "ranked"), [("dare_linear", "della_linear"), ("dare_ties", "della")]
)
def test_della_without_a_window_is_dare(plain: str, ranked: str) -> None:
    """At ε = 0 both drop and rescale alike."""
    models = [np.arange(-32.0, 32.0).reshape(8, 8).tolist(), np.arange(64.0).reshape(8, 8).tolist()]
    for seed in range(4):
        assert_exactly(
            merged(ranked, *models, density=0.5, epsilon=0.0, seed=seed),
            merged(plain, *models, density=0.5, seed=seed),
        )


def test_della_divides_by_its_own_probability() -> None:
    """An entry that stays is divided by the probability of its rank in its row."""
    rows = [[1.0, -4.0, 2.0, 3.0], [8.0, 8.0, -8.0, 8.0]]
    chances = [
        [0.25, 0.75, 0.25 + 0.5 / 3, 0.25 + 1 / 3],
        [0.75, 0.25 + 1 / 3, 0.25 + 0.5 / 3, 0.25],
    ]
    kept = np.zeros((2, 4), bool)
    for seed in range(40):
        got = np.array(merged("della_linear", rows, density=0.5, epsilon=0.25, seed=seed))
        expected = np.where(got != 0, np.array(rows) / np.array(chances), 0)
        assert np.allclose(got, expected, rtol=1e-6)
        kept |= got != 0
    assert kept.all()


def test_della_restores_the_norm_of_the_tensor() -> None:
    """With l1 one factor is common to all rows of a tensor."""
    rows = [[1.0, -4.0, 2.0, 3.0], [8.0, 8.0, -8.0, 8.0]]
    for seed in range(10):
        got = np.array(merged("della", rows, density=0.5, epsilon=0.25, seed=seed, rescale="l1"))
        left = np.array(rows)[got != 0]
        assert np.allclose(got[got != 0], left * 42 / np.abs(left).sum(), rtol=1e-6)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.1, 0.15), (0.9, 0.2), (0.5, 0.5)])
def test_della_refuses_what_are_no_probabilities(density: float, epsilon: float) -> None:
    """ρ - ε must be above 0 and ρ + ε at most 1; the error says what would fit."""
    for method in RANKED:
        with pytest.raises(ParameterError, match=r"density - epsilon and density \+ epsilon"):
            merged(method, TAU, density=density, epsilon=epsilon)
    assert_exactly(merged("della", TAU, density=1.0, epsilon=0.3), TAU)


def test_magnitude_pruning_keeps_the_largest() -> None:
    """⌊.5 · 5⌋ = 2 of each stay, unscaled, and add up; equals go by their order."""
    tau = [3.0, -1.0, 0.5, 2.0, -4.0]
    assert_exactly(merged("magnitude_prune", tau, density=0.5), [3, 0, 0, 0, -4])
    got = merged("magnitude_prune", tau, [2, 2, -2, 1, 0], density=0.5, weights=(1.0, 0.5))
    assert_exactly(got, [4, 1, 0, 0, -4])
    assert_exactly(merged("magnitude_prune", tau, density=1.0), tau)
    assert_exactly(merged("magnitude_prune", tau, density=0.1), [0] * 5)
    got = merged("magnitude_prune", tau, density=0.1, count="at_least_one", lam=0.5)
    assert_exactly(got, [0, 0, 0, 0, -2])


def test_magnitude_pruning_is_per_tensor() -> None:
    """Half of each tensor stays, and half of the model where that is the scope."""
    tau = {"a": np.array([1, 2], np.float32), "b": np.array([3, 4], np.float32)}
    base = {name: np.zeros(2, np.float32) for name in tau}
    got = merge_models([tau], base=base, method="magnitude_prune", density=0.5)
    assert_exactly({n: t.tolist() for n, t in got.items()}, {"a": [0, 2], "b": [0, 4]})
    got = merge_models([tau], base=base, method="magnitude_prune", density=0.5, scope="model")
    assert_exactly({n: t.tolist() for n, t in got.items()}, {"a": [0, 0], "b": [3, 4]})


def test_graft_takes_the_largest_of_the_model() -> None:
    """Of four entries in two tensors half is two, whatever their tensors; one stays at least."""
    tau = {"a": np.array([1, -4], np.float32), "b": np.array([3, 2], np.float32)}
    base = {name: np.ones(2, np.float32) for name in tau}
    model = {name: base[name] + tau[name] for name in tau}
    got = merge_models([model], base=base, method="graft", density=0.5)
    assert_exactly({n: t.tolist() for n, t in got.items()}, {"a": [1, -3], "b": [4, 1]})
    got = merge_models([model], base=base, method="graft", lam=0.5)
    assert_exactly({n: t.tolist() for n, t in got.items()}, {"a": [1, -1], "b": [1, 1]})
    got = merge_models([model], base=base, method="graft", count="exact")
    assert_exactly({n: t.tolist() for n, t in got.items()}, {"a": [1, 1], "b": [1, 1]})
    with pytest.raises(ParameterError, match="graft: number of models"):
        merge_models([model, model], base=base, method="graft")


@pytest.mark.parametrize("rescale", ["density", "l1"])
def test_what_is_merged_can_lose_entries_too(rescale: str) -> None:
    """After models are combined one mask is drawn, which does not depend on what they were."""
    first, other = np.arange(1.0, 65.0), np.arange(65.0, 129.0)
    then = [f"drop:density=0.5,seed=1,rescale={rescale}"]
    got = np.array(merged("task_arithmetic", first.tolist(), other.tolist(), then=then))
    again = np.array(merged("task_arithmetic", other.tolist(), then=then))
    kept = got != 0
    assert 20 <= int(kept.sum()) <= 44
    assert np.array_equal(kept, again != 0)
    whole = first + other
    factor = 2 if rescale == "density" else whole.sum() / whole[kept].sum()
    assert np.allclose(got[kept], factor * whole[kept], rtol=1e-6)
