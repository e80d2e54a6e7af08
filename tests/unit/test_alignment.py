"""Bounds of cosines between singular vectors, against full decompositions in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from mergebench.compute.alignment import alignments
from mergebench.compute.christoffel import mass_bound
from mergebench.compute.krylov import lanczos, leading

Array = np.ndarray[Any, np.dtype[Any]]
#: A tall matrix of which the least singular value is too small to tell it from zero.
NEARLY_SQUARE = (130, 110)
SHAPES = [(160, 160), (120, 300), (100, 130), (300, 120), NEARLY_SQUARE]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of BLAS cost more than they give on matrices this small."""
    with threadpool_limits(1):
        yield


def bulk(random: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Independent entries: a bulk of singular values, without leading ones."""
    return random.normal(size=shape) / np.sqrt(max(shape))


def trained(random: np.random.Generator, shape: tuple[int, int]) -> Array:
    """A bulk under singular values that fall by a power law."""
    count = 20
    left = np.linalg.qr(random.normal(size=(shape[0], count)))[0]
    right = np.linalg.qr(random.normal(size=(shape[1], count)))[0]
    return bulk(random, shape) + left * (12 * np.arange(1, count + 1) ** -0.7) @ right.T


def twins(random: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Leading singular values in equal pairs: their vectors are not unique."""
    count = 12
    left = np.linalg.qr(random.normal(size=(shape[0], count)))[0]
    right = np.linalg.qr(random.normal(size=(shape[1], count)))[0]
    return bulk(random, shape) / 3 + left * np.repeat([9.0, 8, 7, 6, 5, 4], 2) @ right.T


def thin(random: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Of low rank: most singular values vanish."""
    count = 30
    left = np.linalg.qr(random.normal(size=(shape[0], count)))[0]
    return left * np.arange(count, 0, -1) @ random.normal(size=(count, shape[1]))


def diagonal(random: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Singular vectors are coordinates."""
    found = np.zeros(shape)
    np.fill_diagonal(found, np.linspace(10, 1, min(shape)))
    return found


MAKERS = (trained, bulk, twins, thin, diagonal)


def exact(base: Array, tuned: Array, k: int) -> tuple[Array, Array]:
    """Singular values, and the largest |cosine| with any left vector of the base."""
    known = np.linalg.svd(base, full_matrices=False)[0]
    vectors, sigma, _ = np.linalg.svd(tuned, full_matrices=False)
    return sigma[:k], np.abs(known.T @ vectors[:, :k]).max(axis=0)


def assert_bounds(base: Array, update: tuple[Array, Array], epsilons: tuple[float, ...]) -> int:
    """Whatever is decided is what full decompositions say; how many directions were."""
    base = base.astype(np.float32)
    left, right = (each.astype(np.float32) for each in update)
    tuned = base.astype(np.float64) + left.astype(np.float64) @ right.astype(np.float64)
    sigma, cosines = exact(base.astype(np.float64), tuned, 5)
    count = 0
    for given in ((left, right), tuned.astype(np.float32)):
        found = alignments(base, given, 5, epsilons)
        if found is None:
            continue
        count += len(cosines)
        np.testing.assert_allclose(found.sigma, sigma, rtol=1e-5)
        assert np.all(found.lower <= cosines)
        assert np.all(cosines <= found.upper)
        for epsilon in epsilons:
            assert np.all((found.lower >= epsilon) | (found.upper < epsilon))
            np.testing.assert_array_equal(found.upper < epsilon, cosines < epsilon)
    return count


def updates(random: np.random.Generator, shape: tuple[int, int], size: float) -> Any:
    """A random update of rank 3 and spectral norm ``size``."""
    left = np.linalg.qr(random.normal(size=(shape[0], 3)))[0]
    right = np.linalg.qr(random.normal(size=(shape[1], 3)))[0]
    return left * [size, size * 0.8, size * 0.6], right.T


@pytest.mark.parametrize("make", MAKERS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bounds_hold(make: Callable[..., Array], shape: tuple[int, int]) -> None:
    """Over many matrices and sizes of updates; trained ones are decided, not handed on."""
    decided = 0
    for seed in range(2):
        for size in (0.5, 4.0, 11.0, 30.0):
            random = np.random.default_rng(seed)
            decided += assert_bounds(make(random, shape), updates(random, shape, size), (0.5,))
    if make is trained and shape != NEARLY_SQUARE:
        assert decided >= 0.8 * 2 * 4 * 2 * 5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_several_thresholds(shape: tuple[int, int]) -> None:
    """Every threshold of a sweep is decided alike."""
    for seed in range(2):
        random = np.random.default_rng(seed)
        assert_bounds(trained(random, shape), updates(random, shape, 12.0), (0.4, 0.5, 0.7, 0.9))


@pytest.mark.parametrize("shape", [(200, 200), (150, 400), (400, 150)], ids=str)
def test_a_known_base_settles_what_bounds_leave_open(shape: tuple[int, int]) -> None:
    """A threshold just beside a cosine; of full updates and of factors."""
    random = np.random.default_rng(1)
    base = trained(random, shape).astype(np.float32)
    left, right = updates(random, shape, 12.0)
    factors = left.astype(np.float32), right.astype(np.float32)
    tuned = base + factors[0] @ factors[1]
    _, cosines = exact(base.astype(np.float64), tuned.astype(np.float64), 5)
    known = np.linalg.svd(base.astype(np.float64), full_matrices=False)[0].astype(np.float32)
    near = (float(cosines.min()) - 1e-4, float(cosines.min()) + 1e-4)
    for given in (tuned, factors):
        assert alignments(base, given, 5, near) is None
        found = alignments(base, given, 5, near, lambda: known)
        assert found is not None
        assert np.all(found.lower <= cosines)
        assert np.all(cosines <= found.upper)
        assert np.max(found.upper - found.lower) < 1e-4
        np.testing.assert_array_equal(found.upper < near[1], cosines < near[1])


def test_intruders_of_the_paper() -> None:
    """A worked matrix: one intruder at index 0 with cosine .1162, the next .961."""
    size = 100
    base = np.diag(np.linspace(10, 1, size)).astype(np.float32)
    u = np.full((size, 1), 0.1, np.float32)
    found = alignments(base, (30 * u, u.T), 3, (0.5,))

    assert found is not None
    assert found.lower[0] <= 0.1162 <= found.upper[0] < 0.5
    assert 0.9 < found.lower[1] <= 0.961 <= found.upper[1] + 5e-4


def test_what_cannot_be_decided_is_handed_on() -> None:
    """Small matrices, vanishing ones, and a threshold in the middle of what is known."""
    random = np.random.default_rng(0)
    assert (
        alignments(np.ones((20, 20), np.float32), np.ones((20, 20), np.float32), 5, (0.5,)) is None
    )
    zero = np.zeros((160, 160), np.float32)
    assert alignments(zero, zero, 5, (0.5,)) is None
    base = trained(random, (160, 160)).astype(np.float32)
    tuned = (base + 12 * bulk(random, (160, 160))).astype(np.float32)
    cosine = exact(base.astype(np.float64), tuned.astype(np.float64), 5)[1].min()
    assert alignments(base, tuned, 5, (float(cosine),)) is None


@pytest.mark.parametrize("steps", [2, 8, 24])
def test_no_eigenvector_has_more_than_the_bound(steps: int) -> None:
    """The component along every eigenvector, for spectra with gaps, clusters and zeros."""
    random = np.random.default_rng(1)
    for spectrum in (
        np.linspace(0, 4, 80),
        np.r_[np.full(20, 1.0), np.linspace(2, 3, 60)],
        np.r_[np.zeros(30), random.uniform(1, 2, 49), 9.0],
    ):
        vectors = np.linalg.qr(random.normal(size=(80, 80)))[0]
        operator = (vectors * spectrum) @ vectors.T
        start = random.normal(size=(80, 3)) * [[1.0, 1.0, 0.1]] + 3 * vectors[:, 5:6]
        start /= np.linalg.norm(start, axis=0)
        alpha, beta = lanczos(lambda block, own=operator: own @ block, start, steps)
        for place in range(3):
            weights = [
                np.linalg.norm((vectors.T @ start[:, place])[np.isclose(spectrum, value)])
                for value in spectrum
            ]
            bound = mass_bound(
                alpha[place],
                beta[place],
                low=0.0,
                slack=1e-12,
                weight=np.ones_like,
                target=0.0,
            )
            assert max(weights) <= bound + 1e-9


def test_more_steps_tell_more() -> None:
    """A start that is spread evenly over 400 eigenvectors is seen to be so."""
    spectrum = np.linspace(0, 1, 400)
    start = np.full((400, 1), 1 / 20.0)

    def bound(steps: int) -> float:
        alpha, beta = lanczos(lambda block: spectrum[:, None] * block, start, steps)
        given = {"low": 0.0, "slack": 1e-9, "weight": np.ones_like, "target": 0.35}
        return mass_bound(alpha[0], beta[0], **given)

    assert bound(4) > 0.35
    assert 0.05 <= bound(32) < 0.35


def test_leading_pairs() -> None:
    """Values, vectors and residuals against a full decomposition."""
    random = np.random.default_rng(3)
    matrix = trained(random, (150, 150))
    gram = matrix @ matrix.T
    values, vectors = np.linalg.eigh(gram)
    found = leading(
        lambda block: gram @ block, random.normal(size=(150, 12)), 4, tolerance=1e-10, rounds=30
    )

    np.testing.assert_allclose(found.values[:4], values[::-1][:4], rtol=1e-9)
    cosines = np.abs(np.sum(found.vectors[:, :4] * vectors[:, ::-1][:, :4], axis=0))
    np.testing.assert_allclose(cosines, 1, atol=1e-9)
    assert np.all(found.residuals[:4] <= 1e-10 * found.values[:4])
    rest = gram @ found.vectors - found.vectors * found.values
    np.testing.assert_allclose(np.linalg.norm(rest, axis=0), found.residuals, atol=1e-9)


def test_a_partner_deep_in_the_bulk() -> None:
    """A direction that leads nowhere near the top of the base may still be one of its vectors."""
    random = np.random.default_rng(5)
    base = trained(random, (160, 200)).astype(np.float32)
    vectors = np.linalg.svd(base.astype(np.float64))[0]
    u = 0.5 * vectors[:, :1] + np.sqrt(0.75) * vectors[:, 120:121]
    right = np.linalg.qr(random.normal(size=(200, 1)))[0].T

    assert assert_bounds(base, (200 * u, right), (0.6,)) == 0
