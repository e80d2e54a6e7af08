"""Pairs of updates whose angles and interference can be read off."""

from __future__ import annotations

import numpy as np
import pytest

from mergebench.compute.crosstalk import crosstalk_of as crosstalk
from mergebench.compute.crosstalk import principal_cosines as cosines
from mergebench.compute.decomposition import decompose, decompose_product
from mergebench.spectral.pairs import (
    alignment_ratio,
    interference,
    leading,
    random_overlap,
)

E = np.eye(8)


def slices(seed: int, first: int, second: int, rank: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two updates A Bᵀ whose B are columns of one orthogonal basis, from two places on."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.standard_normal((12, 12)))[0]
    one, other = (random.standard_normal((10, rank)) for _ in range(2))
    return one @ basis[:, first : first + rank].T, other @ basis[:, second : second + rank].T


def test_disjoint_slices_do_not_disturb_each_other() -> None:
    """Crosstalk below 1e-6, and on inputs of one update the sum does what it alone does."""
    one, other = slices(0, 0, 3)

    assert crosstalk(decompose(one), decompose(other)) < 1e-6
    x = one.T @ np.ones(10)
    np.testing.assert_allclose((one + other) @ x, one @ x, atol=1e-12)


def test_shared_slices_disturb_each_other_fully() -> None:
    """The same slice: all row directions shared, ‖QᵢᵀQⱼ‖ / √min = 1."""
    one, other = (decompose(each) for each in slices(1, 2, 2))
    rows = cosines(one.Vt[: one.rank].T, other.Vt[: other.rank].T)

    assert (one.rank, other.rank) == (3, 3)
    assert np.linalg.norm(rows) / np.sqrt(3) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(rows, 1.0, atol=1e-6)


def test_crosstalk_is_that_of_the_matrices() -> None:
    """‖X Yᵀ‖ / (‖X‖ ‖Y‖) from the definition; of rank 1 with itself 1; of zeros 0."""
    random = np.random.default_rng(2)
    one, other = random.standard_normal((2, 6, 9))
    expected = np.linalg.norm(one @ other.T) / np.linalg.norm(one) / np.linalg.norm(other)

    assert crosstalk(decompose(one), decompose(other)) == pytest.approx(expected, rel=1e-6)
    alone = decompose(np.outer(E[0], E[1]))
    assert crosstalk(alone, alone) == pytest.approx(1.0)
    assert crosstalk(alone, decompose(np.zeros((8, 8)))) == 0.0


def test_principal_angles() -> None:
    """A plane tilted by 30° around a shared axis has angles of 0° and 30°."""
    tilted = np.cos(np.pi / 6) * E[1] + np.sin(np.pi / 6) * E[2]

    found = cosines(E[:, :2], np.stack([E[0], tilted], axis=1))

    np.testing.assert_allclose(np.degrees(np.arccos(found)), [0, 30], atol=1e-6)
    assert cosines(E[:, :2], E[:, :0]).size == 0


def test_leading_directions_by_energy() -> None:
    """σ = 3, 1 hold 90 % in one direction; all of it takes both."""
    found = decompose(np.diag([3.0, 1.0]))

    assert [leading(found, share) for share in (0.9, 0.95, 1.0)] == [1, 2, 2]


def test_interference_of_copies_and_of_strangers() -> None:
    """Two copies of diag(3, 1) at k = 1 give 6; disjoint directions 0."""
    copy = decompose(np.diag([3.0, 1.0]))
    one, other = (decompose(np.outer(E[i], E[j])) for i, j in ((0, 1), (2, 3)))

    assert interference([copy, copy], 1) == pytest.approx((6.0, 1.0))
    assert interference([one, other], 1) == pytest.approx((0.0, 0.0), abs=1e-7)
    assert interference([decompose(np.zeros((2, 2)))] * 2, 1) == (0.0, 0.0)


def test_interference_is_that_of_the_matrices() -> None:
    """From stacked U, Σ and V as the paper writes it."""
    parts = [
        decompose(each, np.float64) for each in np.random.default_rng(5).normal(size=(3, 7, 6))
    ]
    U = np.concatenate([p.U[:, :2] for p in parts], axis=1)
    V = np.concatenate([p.Vt[:2].T for p in parts], axis=1)
    S = np.diag(np.concatenate([p.S[:2] for p in parts]))
    eye = np.eye(6)
    expected = abs((U.T @ U - eye) @ S @ (V.T @ V - eye)).sum()

    found = interference(parts, 2)

    assert found == pytest.approx((expected, expected / np.trace(S)))


def test_alignment_with_a_merge() -> None:
    """The merge keeps e1 (its 5 % residual drops e2 of size .1): a task along both keeps 3 of 5."""
    merge = decompose(np.diag([10.0, 0.1, 0.0]))
    task = decompose(np.diag([3.0, 4.0, 0.0]))

    ratio, count = alignment_ratio(task, merge, 0.05)

    assert (ratio, count) == (pytest.approx(0.6), 1)
    ratio, count = alignment_ratio(task, merge, 0.001)
    assert (ratio, count) == (pytest.approx(1.0), 2)
    zero = decompose(np.zeros((3, 3)))
    assert np.isnan(alignment_ratio(zero, merge, 0.05)[0])
    assert np.isnan(alignment_ratio(task, zero, 0.05)[0])


def test_the_residual_of_an_alignment_is_just_met() -> None:
    """One direction fewer would leave more of the merge than 5 %."""
    matrix = np.random.default_rng(6).standard_normal((12, 9)) @ np.diag(2.0 ** -np.arange(9))
    found = decompose(matrix, np.float64)

    _, count = alignment_ratio(found, found, 0.05)

    count = int(count)
    left = [
        np.linalg.norm(matrix - found.U[:, :k] @ found.U[:, :k].T @ matrix) for k in range(10)
    ] / np.linalg.norm(matrix)
    assert left[count] <= 0.05 < left[count - 1]


def test_random_spaces_overlap_as_much_as_drawn_ones() -> None:
    """√(max(r, q) / d) is the root mean square over drawn spaces."""
    random = np.random.default_rng(7)
    drawn = []
    for _ in range(300):
        one, other = (np.linalg.qr(random.standard_normal((20, r)))[0] for r in (3, 5))
        drawn.append(np.linalg.norm(one.T @ other) ** 2 / 3)

    assert random_overlap(20, 3, 5) == pytest.approx(np.sqrt(np.mean(drawn)), rel=0.03)
    assert random_overlap(20, 0, 5) == 0.0


def test_products_and_matrices_agree() -> None:
    """Updates given as factors have the crosstalk of their products."""
    random = np.random.default_rng(8)
    pairs = [(random.standard_normal((9, 2)), random.standard_normal((2, 7))) for _ in range(2)]
    thin = [decompose_product(*each) for each in pairs]
    full = [decompose(left @ right, np.float64) for left, right in pairs]

    assert crosstalk(*thin) == pytest.approx(crosstalk(*full), rel=1e-9)
    assert interference(thin, 2) == pytest.approx(interference(full, 2), rel=1e-9)
