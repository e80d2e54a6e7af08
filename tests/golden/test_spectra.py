"""Ranks, energies, movements and power laws worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mergebench.compute.decomposition import Decomposition, decompose, numerical_rank
from mergebench.spectral.diagnostics.allocation import _finish as finish
from mergebench.spectral.diagnostics.rotation import moved
from mergebench.spectral.measures import (
    curve,
    effective_rank,
    elbow,
    energy,
    pela_rank,
    power_law,
    rank_for,
    stable_rank,
)


def test_effective_rank() -> None:
    """Four equal values are four; 8, 1, 1 are 1.8946; scale and zeros do not matter."""
    assert effective_rank(np.ones(4)) == pytest.approx(4.0)
    assert effective_rank(np.array([8.0, 1, 1])) == pytest.approx(1.8946, abs=5e-5)
    assert effective_rank(1e-300 * np.array([8.0, 1, 1, 0])) == pytest.approx(1.8946, abs=5e-5)
    assert effective_rank(np.array([5.0])) == 1.0
    assert effective_rank(np.zeros(3)) == 0.0
    assert effective_rank(np.zeros(0)) == 0.0


def test_stable_and_numerical_rank() -> None:
    """‖W‖²F/‖W‖²₂, and how many values are above 2⁻²⁰ of the largest."""
    assert stable_rank(np.array([2.0, 1, 1])) == pytest.approx(1.5)
    assert stable_rank(np.zeros(2)) == 0.0
    assert stable_rank(1e200 * np.array([2.0, 1, 1])) == pytest.approx(1.5)
    assert numerical_rank(np.array([1.0, 2.0**-19, 2.0**-21, 0])) == 2
    assert numerical_rank(np.zeros(3)) == 0
    assert numerical_rank(np.zeros(0)) == 0


def test_energy_and_ranks() -> None:
    """σ = 3, 2, 1, 0 hold 9, 13 and 14 of 14."""
    values = np.array([3.0, 2, 1, 0])

    np.testing.assert_allclose(energy(values), np.array([9, 13, 14, 14]) / 14)
    assert [rank_for(values, share) for share in (0.5, 9 / 14, 0.9, 0.95, 1.0)] == [1, 1, 2, 3, 3]
    assert rank_for(np.zeros(3), 0.9) == 0
    assert energy(np.zeros(3)).size == 0


def test_elbows() -> None:
    """Two large values before a tail; a straight line has no bend, and zeros have no values."""
    assert elbow(np.array([10.0, 9, 1, 0.9, 0.8, 0.7])) == 2
    assert elbow(np.array([10.0, 1, 0.9, 0.8, 0.7, 0.6])) == 1
    assert elbow(np.array([4.0, 3, 2, 1])) == 4
    assert elbow(np.array([2.0, 2, 2, 2])) == 4
    assert elbow(1e-200 * np.array([10.0, 9, 1, 0.9, 0.8, 0.7])) == 2
    assert (elbow(np.zeros(4)), elbow(np.array([3.0, 1])), elbow(np.zeros(0))) == (0, 2, 0)


@pytest.mark.parametrize(("shape", "rank"), [((768, 768), 128), ((768, 3072), 204), ((4, 1), 1)])
def test_ranks_of_pela(shape: tuple[int, int], rank: int) -> None:
    """⌊in · out / (3 (in + out))⌋, whichever side is which."""
    assert pela_rank(*shape) == pela_rank(*shape[::-1]) == rank


def test_what_a_rank_leaves_is_the_rest_of_the_energy() -> None:
    """The error of the best approximation of rank r is √Σ_{i > r} σ² (Eckart-Young)."""
    matrix = np.random.default_rng(0).standard_normal((9, 6))
    found = decompose(matrix, np.float64)
    for rank in range(6):
        best = (found.U[:, :rank] * found.S[:rank]) @ found.Vt[:rank]
        reached = energy(found.S)[rank - 1] if rank else 0.0
        left = np.linalg.norm(matrix - best) / np.linalg.norm(matrix)
        assert left == pytest.approx(np.sqrt(1 - reached), abs=1e-9)


def test_curves_hold_both_ends() -> None:
    """At most so many places, the first and the last value among them; 0 gives all."""
    values = np.linspace(10, 1, 100)

    few, every = curve(values, 8), curve(values, 0)

    assert (few[0]["index"], few[-1]["index"]) == (0, 99)
    assert len(few) <= 8
    assert [each["index"] for each in every] == list(range(100))
    assert few[-1] == every[-1]
    assert every[-1]["energy"] == pytest.approx(1.0)
    assert curve(np.zeros(2), 8) == [{"index": i, "sigma": 0.0, "energy": 0.0} for i in (0, 1)]


def test_sorsa_metrics() -> None:
    """Two of three left vectors turned by .1, σ1 + .3: ΔΣ = .1 and ΔD = .0016653."""
    c, s = np.cos(0.1), np.sin(0.1)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    before = Decomposition(np.eye(3), np.array([3.0, 2, 1]), np.eye(3))
    after = Decomposition(turn, np.array([3.3, 2, 1]), np.eye(3))

    found = moved(before, after)

    assert found["sigma"] == pytest.approx(0.1)
    assert found["direction"] == pytest.approx(0.0016653, abs=5e-8)
    assert (found["sigma_matched"], found["direction_matched"]) == pytest.approx(
        (found["sigma"], found["direction"])
    )
    assert (found["moved"], found["count"]) == (0.0, 3)


def test_a_crossing_is_no_rotation_once_matched() -> None:
    """diag(3, 2) becomes diag(2, 3): by place everything turned, matched nothing did."""
    found = moved(decompose(np.diag([3.0, 2])), decompose(np.diag([2.0, 3])))

    assert found["direction"] == pytest.approx(1.0)
    assert found["direction_matched"] == pytest.approx(0.0, abs=1e-7)
    assert found["sigma"] == pytest.approx(0.0)
    assert found["sigma_matched"] == pytest.approx(1.0)
    assert found["moved"] == 1.0
    assert moved(decompose(np.zeros((2, 2))), decompose(np.eye(2)))["direction"] is None


def test_power_law_of_four() -> None:
    """1, 2, 4, 8: tails from 1, 2 and 4 give α 1.9618, 2.4427, 3.8854; the first fits best."""
    found = power_law(np.array([4.0, 1, 8, 2]))

    assert found is not None
    assert found.alpha == pytest.approx(1.9618, abs=5e-5)
    assert found.distance == pytest.approx(0.2366, abs=5e-5)
    assert (found.smallest, found.largest, found.tail) == (1.0, 8.0, 4)
    assert found.error == pytest.approx(0.9618 / 2, abs=5e-5)
    assert found.weighted == pytest.approx(found.alpha * np.log10(8))
    for tail, alpha, distance in (([2.0, 4, 8], 2.4427, 0.2988), ([4.0, 8], 3.8854, 0.3647)):
        sole = power_law_of_tail(np.array(tail))
        assert sole == pytest.approx((alpha, distance), abs=5e-5)


def power_law_of_tail(tail: np.ndarray) -> tuple[float, float]:
    """α and distance of one tail, straight from the formulas."""
    alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
    fitted = 1 - (tail / tail[0]) ** (1 - alpha)
    return alpha, max(abs(fitted - np.arange(len(tail)) / len(tail)))


def test_power_law_takes_the_nearest_tail() -> None:
    """Of all tails the one whose distance is least, for any scale; α of drawn tails is found."""
    random = np.random.default_rng(4)
    values = np.sort(np.concatenate([random.pareto(2.0, 300) + 1, random.random(200)]))
    every = [power_law_of_tail(values[start:]) for start in range(len(values) - 1)]
    best = min(every, key=lambda each: each[1])

    found, scaled = power_law(values), power_law(1e-3 * values)

    assert found is not None
    assert scaled is not None
    assert (found.alpha, found.distance) == pytest.approx(best)
    assert scaled.alpha == pytest.approx(found.alpha)
    assert found.alpha == pytest.approx(3.0, abs=3 * found.error)


def test_the_shortest_tail_has_two_values() -> None:
    """Of two values only the largest begins no tail."""
    found = power_law(np.array([8.0, 4.0]))

    assert found is not None
    assert (found.alpha, found.distance) == pytest.approx((3.8854, 0.3647), abs=5e-5)
    assert (found.smallest, found.tail) == (4.0, 2)


def test_power_law_needs_a_tail_that_varies() -> None:
    """Equal values, and fewer than two, have none."""
    assert power_law(np.full(20, 3.0)) is None
    assert power_law(np.array([2.0])) is None
    assert power_law(np.zeros(0)) is None


def test_ranks_within_a_budget() -> None:
    """Needs of 1, 2 and 5 scale together to the parameters of rank 4 everywhere."""
    shapes = [(10, 10)] * 3
    rows = [{"needed": n, "reached": np.linspace(0.1, 1, 10).tolist()} for n in (1, 2, 5)]

    found = finish(rows, shapes, rank=4, share=0.9)

    assert [each["suggested"] for each in found] == [1, 3, 8]
    assert sum(each["parameters"] for each in found) <= 4 * 20 * 3
    assert [each["kept"] for each in found] == pytest.approx([0.1, 0.3, 0.8])
    assert [each["kept_uniform"] for each in found] == pytest.approx([0.4] * 3)


def test_ranks_without_need() -> None:
    """A matrix that needs nothing gets nothing, and nobody gets more than the full rank."""
    rows = [{"needed": 0, "reached": []}, {"needed": 2, "reached": [0.5, 1.0]}]

    found = finish(rows, [(4, 4), (2, 8)], rank=16, share=0.9)

    assert [each["suggested"] for each in found] == [0, 2]
    assert [each["kept"] for each in found] == [0.0, 1.0]
