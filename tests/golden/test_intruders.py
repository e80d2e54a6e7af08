"""Intruder dimensions of matrices whose answers are known."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import pytest

from mergebench.compute.decomposition import Decomposition, decompose
from mergebench.compute.intruders import Intruders, intruders
from mergebench.compute.removal import removal
from mergebench.core.errors import MismatchError
from mergebench.spectral.baseline import expected_largest

E3 = np.eye(3)


def flags(found: Intruders, place: int = 0) -> list[bool]:
    """Which directions are intruders at one of the thresholds."""
    return [each.intruder[place] for each in found.directions]


def planted() -> tuple[np.ndarray, np.ndarray]:
    """A diagonal base of 100 × 100, and an update of size 30 along the even direction."""
    u = np.full(100, 0.1)
    base = np.diag(np.linspace(10, 1, 100))
    return base, base + 30 * np.outer(u, u)


def test_one_planted_direction() -> None:
    """The even direction meets each base vector at .1162; the next one is the base's own."""
    base, tuned = planted()

    found = intruders(base, tuned)

    assert len(found.directions) == 10
    assert flags(found) == [True] + [False] * 9
    assert found.directions[0].cosine == pytest.approx(0.1162, abs=5e-5)
    assert found.directions[1].cosine == pytest.approx(0.961, abs=5e-4)
    assert found.directions[0].sigma == pytest.approx(np.linalg.norm(tuned, 2))
    assert (found.count(0.5), found.dimension, found.vectors) == (1, 100, 100)
    share = found.directions[0].sigma ** 2 / np.linalg.norm(tuned) ** 2
    assert found.energy(0.5) == pytest.approx(share)
    assert all(each.status == "exact" and each.bound == each.cosine for each in found.directions)


def test_scaling_the_planted_direction_leaves_what_the_specification_says() -> None:
    """Of 30, .4156 is left of ΔW at λ = .5 and .2337 at λ = 0."""
    base, tuned = planted()
    U, S, Vt = np.linalg.svd(tuned)
    place = intruders(base, tuned).directions[0].index

    for lam, left in ((0.5, 0.4156), (0.0, 0.2337)):
        mended = tuned + (lam - 1) * S[place] * np.outer(U[:, place], Vt[place])
        assert np.linalg.norm(mended - base) / 30 == pytest.approx(left, abs=5e-5)
        made = removal(base, tuned - base, lam=lam)
        np.testing.assert_allclose(tuned + made.left @ made.right, mended, atol=1e-12)
        assert made.kept == pytest.approx(left, abs=5e-5)
        # Neither control knows the direction; both end where their norm says.
        shorter = [removal(base, tuned - base, lam=lam, control=c) for c in ("removed", "norm")]
        assert [each.left.size for each in shorter] == [0, 0]
        assert shorter[0].scale == pytest.approx(max(1 - (1 - lam) * S[place] / 30, 0.0))
        assert shorter[1].scale == pytest.approx(left, abs=5e-5)


def test_noise_plants_nothing() -> None:
    """Noise of 1e-3 rotates no leading vector away."""
    base, _ = planted()
    noise = 1e-3 * np.random.default_rng(0).standard_normal(base.shape)

    assert flags(intruders(base, base + noise)) == [False] * 10


def test_several_thresholds_at_once() -> None:
    """Each threshold gets the answer that it would get alone."""
    base, tuned = planted()
    epsilons = (0.05, 0.12, 0.5, 0.97)

    found = intruders(base, tuned, k=3, epsilons=epsilons)

    for place, epsilon in enumerate(epsilons):
        alone = intruders(base, tuned, k=3, epsilons=(epsilon,))
        assert flags(found, place) == flags(alone)
        assert found.count(epsilon) == alone.count(epsilon)
    largest = abs(np.linalg.svd(tuned)[0][:, :3]).max(axis=0)
    assert [found.count(each) for each in epsilons] == [0, 1, 1, np.sum(largest < 0.97)]


def test_a_direction_of_either_side() -> None:
    """A new input for an old output is an intruder on the right side only."""
    base = np.zeros((3, 4))
    base[0, 0], base[1, 1] = 2.0, 1.0
    tuned = base + 5 * np.outer(E3[0], np.eye(4)[3])

    left, right = (intruders(base, tuned, k=1, side=side) for side in ("left", "right"))

    assert flags(left) == [False]
    assert flags(right) == [True]
    assert left.directions[0].cosine == pytest.approx(1.0)
    assert right.directions[0].cosine == pytest.approx(2 / 29**0.5)
    assert (left.dimension, right.dimension, left.vectors) == (3, 4, 2)


def test_signed_cosines_follow_the_convention() -> None:
    """Signed, a vector that points away from all of the base's is new; absolute, it is old.

    Base vectors are e1 and e2, the tuned one is (-.6, -.8, 0) up to a sign that makes its largest
    entry positive, so the sign counts only if the other entry points the other way.
    """
    base = np.diag([2.0, 1.0, 0.0])
    u = np.array([-0.6, 0.8, 0.0])
    tuned = 5 * np.outer(u, u)

    absolute, signed = (intruders(base, tuned, k=1, signed=each) for each in (False, True))
    assert absolute.directions[0].cosine == pytest.approx(0.8)
    assert signed.directions[0].cosine == pytest.approx(0.8)

    only = np.diag([2.0, 0.0, 0.0])
    absolute, signed = (intruders(only, tuned, k=1, signed=each) for each in (False, True))
    assert absolute.directions[0].cosine == pytest.approx(0.6)
    assert signed.directions[0].cosine == pytest.approx(-0.6)
    assert (flags(absolute), flags(signed)) == ([False], [True])


def test_factors_stand_for_the_update() -> None:
    """The base plus left @ right, without the tuned matrix."""
    random = np.random.default_rng(1)
    base = random.standard_normal((7, 5))
    left, right = random.standard_normal((7, 2)), random.standard_normal((2, 5))

    assert intruders(base, factors=(left, right)) == intruders(base, base + left @ right)


def test_known_decompositions_change_nothing() -> None:
    """Given decompositions are used, and give the same."""
    base, tuned = planted()
    known = {"base_svd": decompose(base), "tuned_svd": decompose(tuned)}

    assert intruders(base, tuned, **known) == intruders(base, tuned)
    other = intruders(base, tuned, base_svd=decompose(tuned), tuned_svd=known["tuned_svd"])
    assert not any(flags(other))


@cache
def large() -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray], Decomposition]:
    """A base and a fine-tune of 560 × 560, the factors between them, and the base's SVD."""
    random = np.random.default_rng(4)
    size = 560
    U, S, Vt = np.linalg.svd(random.standard_normal((size, size)))
    base = ((U * (S * (1 + 3 * np.exp(-np.arange(size) / 6)))) @ Vt).astype(np.float32)
    factors = (
        (15 * random.standard_normal((size, 2)) / size**0.25).astype(np.float32),
        (random.standard_normal((2, size)) / size**0.25).astype(np.float32),
    )
    return base, base + factors[0] @ factors[1], factors, decompose(base)


@cache
def exactly(side: Literal["left", "right"], epsilons: tuple[float, ...]) -> Intruders:
    """What two full decompositions of that pair say."""
    base, tuned, _, _ = large()
    return intruders(base, tuned, k=5, epsilons=epsilons, side=side, exact=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("product", [False, True])
def test_bounds_settle_large_matrices(side: Literal["left", "right"], product: bool) -> None:
    """Certified directions have the exact flags, and the exact cosine between their bounds."""
    base, tuned, factors, decomposed = large()
    epsilons = (0.5, 0.8)
    given = {"factors": factors} if product else {}

    fast = intruders(base, tuned, k=5, epsilons=epsilons, side=side, **given)
    slow = exactly(side, epsilons)

    assert [each.status for each in fast.directions] == ["certified"] * 5
    assert [each.status for each in slow.directions] == ["exact"] * 5
    for one, other in zip(fast.directions, slow.directions, strict=True):
        assert one.intruder == other.intruder
        assert one.cosine - 1e-6 <= other.cosine <= one.bound + 1e-6
        assert one.sigma == pytest.approx(other.sigma, rel=1e-5)
    assert slow.count(0.5) == 2
    assert fast.energy(0.5) == pytest.approx(slow.energy(0.5), rel=1e-5)
    assert (fast.dimension, fast.vectors) == (slow.dimension, slow.vectors) == base.shape
    asked: list[bool] = []
    unsure = intruders(base, tuned, k=5, epsilons=(slow.directions[-1].cosine,), side=side,
                       base_svd=lambda: asked.append(True) or decomposed)  # fmt: skip
    assert unsure.directions[-1].status == "exact"
    assert asked == [True]
    # A little beside that cosine, the base's directions settle it without decomposing the other.
    asked.clear()
    near = (slow.directions[-1].cosine + 2e-4, slow.directions[-1].cosine - 2e-4)
    sure = intruders(base, tuned, k=5, epsilons=near, side=side, **given,
                     base_svd=lambda: asked.append(True) or decomposed)  # fmt: skip
    assert asked == [True]
    assert [each.status for each in sure.directions] == ["certified"] * 5
    assert sure.directions[-1].intruder == (True, False)
    for one, other in zip(sure.directions, slow.directions, strict=True):
        assert one.cosine <= other.cosine <= one.bound <= one.cosine + 1e-4
    assert intruders(base, tuned, k=2, side=side, signed=True).directions[0].status == "exact"


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1), (3, 300), (300, 3)])
def test_narrow_matrices(shape: tuple[int, int]) -> None:
    """One row has one left direction, which no update turns away; cosines stay in [0, 1]."""
    random = np.random.default_rng(2)
    base = random.standard_normal(shape)
    tuned = base + random.standard_normal(shape)

    found = intruders(base, tuned)

    assert len(found.directions) == min(shape)
    assert all(0 <= each.cosine <= 1 for each in found.directions)
    if shape[0] == 1:
        assert [each.cosine for each in found.directions] == [1.0]


def test_zeros_have_no_directions() -> None:
    """A tuned matrix of zeros has none to look at; a base of zeros has none to compare with."""
    full = np.diag([3.0, 2.0, 1.0])
    zero = np.zeros((3, 3))

    nothing, new = intruders(full, zero), intruders(zero, full)

    assert nothing.directions == ()
    assert (nothing.count(0.5), nothing.energy(0.5), nothing.squared) == (0, 0.0, 0.0)
    assert flags(new) == [True] * 3
    assert [each.cosine for each in new.directions] == [0.0] * 3
    assert (new.vectors, new.energy(0.5)) == (0, pytest.approx(1.0))
    assert intruders(zero, zero).directions == ()
    assert intruders(np.zeros((0, 4)), np.zeros((0, 4))).directions == ()


def test_only_directions_of_the_base_count() -> None:
    """What a base of rank 1 leaves open belongs to no pretrained direction."""
    base = np.outer([1.0, 0, 0], [1.0, 0, 0])
    tuned = base + 3 * np.outer(E3[1], E3[1])

    found = intruders(base, tuned)

    assert found.vectors == 1
    assert flags(found) == [True, False]
    assert found.directions[0].cosine == pytest.approx(0.0, abs=1e-7)


def test_equal_singular_values_are_named() -> None:
    """The gap of a direction that may be any of a plane is 0."""
    found = intruders(np.diag([3.0, 2.0, 1.0]), np.diag([4.0, 4.0, 1.0]))

    assert [each.gap for each in found.directions] == pytest.approx([0.0, 0.0, 0.75])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_entries_that_are_not_finite_are_refused(bad: float) -> None:
    """Nothing is decomposed that has no decomposition."""
    odd = np.eye(3)
    odd[1, 1] = bad
    for pair in ((odd, np.eye(3)), (np.eye(3), odd)):
        with pytest.raises(MismatchError, match="not finite"):
            intruders(*pair)


def test_shapes_must_agree() -> None:
    """Two matrices of one shape, or factors."""
    with pytest.raises(MismatchError, match=r"\(3, 3\) and \(3, 2\)"):
        intruders(np.eye(3), np.ones((3, 2)))
    with pytest.raises(MismatchError, match="factors"):
        intruders(np.eye(3))


def test_inputs_stay_as_they_are() -> None:
    """Neither matrix nor factors are written to."""
    base, tuned = planted()
    held = base.copy(), tuned.copy()

    intruders(base, tuned)

    np.testing.assert_array_equal((base, tuned), held)


@pytest.mark.parametrize(("size", "expected"), [(1024, 0.107), (4096, 0.059)])
def test_random_directions_of_known_sizes(size: int, expected: float) -> None:
    """What replications have measured for square matrices."""
    assert expected_largest(size, size) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("dimension", "vectors"), [(1, 1), (2, 2), (20, 20), (50, 7), (9, 1)])
def test_random_directions_against_simulation(dimension: int, vectors: int) -> None:
    """The expected largest cosine is the mean of 40,000 drawn ones."""
    drawn = np.random.default_rng(3).standard_normal((40_000, dimension))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    cosines = drawn[:, :vectors]

    for signed, largest in ((False, abs(cosines).max(axis=1)), (True, cosines.max(axis=1))):
        error = largest.std() / 200
        got = expected_largest(dimension, vectors, signed)
        assert abs(got - largest.mean()) <= 4 * error + 1e-6


def test_random_directions_in_closed_form() -> None:
    """In one dimension 1, in the plane (4 / π) sin(π / 4), and nothing without vectors."""
    assert expected_largest(1, 1) == pytest.approx(1.0)
    assert expected_largest(2, 2) == pytest.approx(4 / np.pi * np.sin(np.pi / 4))
    assert expected_largest(5, 0) == 0.0
