"""Soups, WiSE-FT and task arithmetic, worked out by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mergebench import merge_models
from mergebench.core.errors import ParameterError

from .support import assert_exactly, merged

THETA_0 = np.array([1.0, -2.0, 0.0, 8.0], np.float32)
THETA_1 = np.array([3.0, -1.0, 0.5, 8.0], np.float32)
THETA_2 = np.array([-1.0, -3.0, 2.5, 2.0], np.float32)
BASE, ONE, TWO = {"w": THETA_0}, {"w": THETA_1}, {"w": THETA_2}


def test_uniform_soup_is_the_mean() -> None:
    """θ = (θ1 + θ2) / 2, without any base."""
    soup = merge_models([ONE, TWO])["w"]
    assert_exactly(soup.tolist(), [1.0, -2.0, 1.5, 5.0])
    assert_exactly(soup.tolist(), ((THETA_1 + THETA_2) / 2).tolist())


@pytest.mark.parametrize("thetas", [[0.0, 2.0], [0.0, 2.0, 5.0], [5.0]])
def test_uniform_soup_of_scalars(thetas: list[float]) -> None:
    """Scalars average; a soup of one is that one."""
    got = merge_models([{"w": np.array(theta, np.float32)} for theta in thetas])["w"]
    assert got == np.float32(np.float32(1.0 / len(thetas)) * np.float32(sum(thetas)))
    assert abs(float(got) - sum(thetas) / len(thetas)) < 1e-6


def test_weighted_soup_divides_by_the_sum_of_weights() -> None:
    """θ = Σ w θ / Σ w with weights 3 and 1; undivided it is Σ w θ."""
    pairs = [(ONE, 3.0), (TWO, 1.0)]
    assert_exactly(merge_models(pairs)["w"].tolist(), [2.0, -1.5, 1.0, 6.5])
    assert_exactly(merge_models(pairs, normalize=False)["w"].tolist(), [8.0, -6.0, 4.0, 26.0])


def test_weights_of_a_soup_may_not_cancel() -> None:
    """A mean with weights that sum to zero is refused."""
    with pytest.raises(ParameterError, match="weights sum to zero"):
        merge_models([(ONE, 1.0), (TWO, -1.0)])


def test_soup_averages_sixteen_bits_in_float32() -> None:
    """256 + 1 is 257, which bfloat16 cannot hold, so its half is right only in float32."""
    models = [{"w": np.array([value], ml_dtypes.bfloat16)} for value in (256.0, 1.0)]
    got = merge_models(models)["w"]
    assert got.dtype == ml_dtypes.bfloat16
    assert_exactly(got.astype(np.float64).tolist(), [128.0])
    total = merge_models([*models, {"w": np.array([-256.0], ml_dtypes.bfloat16)}], normalize=False)
    assert_exactly(total["w"].astype(np.float64).tolist(), [1.0])


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, [1.0, -2.0, 0.0, 8.0]),
        (0.25, [1.5, -1.75, 0.125, 8.0]),
        (0.5, [2.0, -1.5, 0.25, 8.0]),
        (1.0, [3.0, -1.0, 0.5, 8.0]),
    ],
)
def test_wise_ft_is_a_line_from_base_to_tuned(alpha: float, expected: list[float]) -> None:
    """(1 - α) θ0 + α θ1, whose ends are the base and the fine-tune."""
    got = merge_models([(BASE, 1 - alpha), (ONE, alpha)])["w"]
    assert_exactly(got.tolist(), expected)
    assert_exactly(got.tolist(), ((1 - alpha) * THETA_0 + alpha * THETA_1).tolist())


def test_wise_ft_ends_are_bitwise() -> None:
    """α = 0 and α = 1 give the bytes of base and fine-tune, of any float32 numbers."""
    random = np.random.default_rng(3)
    base, tuned = ({"w": random.normal(size=100).astype(np.float32)} for _ in range(2))
    assert merge_models([(base, 1.0), (tuned, 0.0)])["w"].tobytes() == base["w"].tobytes()
    assert merge_models([(base, 0.0), (tuned, 1.0)])["w"].tobytes() == tuned["w"].tobytes()


@pytest.mark.parametrize(
    ("weights", "lam", "expected"),
    [
        ((1.0, 1.0), 1.0, [1.0, -2.0, 3.0, 2.0]),  # θ0 + τ1 + τ2
        ((1.0, 1.0), 0.5, [1.0, -2.0, 1.5, 5.0]),
        ((1.0, -0.5), 1.0, [4.0, -0.5, -0.75, 11.0]),
        ((-1.0, 0.0), 1.0, [-1.0, -3.0, -0.5, 8.0]),  # forgetting: θ0 - τ1
        ((1.0, 1.0), 0.0, [1.0, -2.0, 0.0, 8.0]),
    ],
)
def test_task_arithmetic(weights: tuple[float, ...], lam: float, expected: list[float]) -> None:
    """θ0 + λ Σ w τ with τ1 = [2, 1, .5, 0] and τ2 = [-2, -1, 2.5, -6]."""
    pairs = list(zip([ONE, TWO], weights, strict=True))
    got = merge_models(pairs, base=BASE, method="task_arithmetic", lam=lam)["w"]
    assert_exactly(got.tolist(), expected)


def test_identical_tasks_at_one_over_their_number_give_the_task() -> None:
    """Four equal tasks with λ = 1/4 give that task."""
    got = merge_models([ONE] * 4, base=BASE, method="task_arithmetic", lam=0.25)["w"]
    assert_exactly(got.tolist(), THETA_1.tolist())


def test_analogy() -> None:
    """Scalars add and subtract: 5 + 3 - 2 = 6."""
    assert_exactly(merged("task_arithmetic", 5.0, 3.0, 2.0, weights=(1.0, 1.0, -1.0)), 6.0)


def test_adding_and_subtracting_cancels_within_a_rounding() -> None:
    """Adding a task vector and then taking it away leaves the base within one rounding."""
    random = np.random.default_rng(4)
    base = {"w": random.normal(size=500).astype(np.float32)}
    tuned = {"w": base["w"] + 0.1 * random.normal(size=500).astype(np.float32)}
    there = merge_models([tuned], base=base, method="task_arithmetic")
    tau = {"w": tuned["w"] - base["w"]}
    zero = {"w": np.zeros(500, np.float32)}
    both = [(there, 1.0), (base, -1.0), (tau, -1.0)]
    back = merge_models(both, base=zero, method="task_arithmetic")["w"]
    assert np.all(np.abs(back) <= 2 * np.spacing(np.abs(tuned["w"]) + np.abs(base["w"])))
