"""Truncation against numpy's singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.compute.decompose import spectrum_of_product, truncate, truncate_product
from mergebench.merge.energy import rank_of


def matrix_of(seed: int, rows: int, columns: int, rank: int) -> np.ndarray:
    """A random matrix of a given rank, float32."""
    random = np.random.default_rng(seed)
    factors = random.normal(size=(rows, rank)), random.normal(size=(rank, columns))
    return np.asarray(factors[0] @ factors[1], np.float32)


def assert_optimal(matrix: np.ndarray, rank: int) -> None:
    """Shapes, residual, product and subspace are those of the leading singular vectors."""
    left, right, residual = truncate(matrix, rank)
    wide = matrix.astype(np.float64)
    kept = min(rank, *matrix.shape)
    assert left.shape == (matrix.shape[0], kept)
    assert right.shape == (kept, matrix.shape[1])
    assert left.dtype == right.dtype == np.float64
    U, S, Vt = np.linalg.svd(wide, full_matrices=False)
    total = np.linalg.norm(wide)
    least = np.sqrt(np.sum(S[kept:] ** 2))
    got = np.linalg.norm(wide - left @ right)
    assert abs(got - least) <= 1e-7 * max(total, 1e-30)
    assert abs(residual - (got / total if total else 0.0)) <= 1e-12
    # Where a gap separates the kept from the dropped values, the best approximation is unique.
    if kept and (kept == len(S) or S[kept - 1] - S[kept] > 1e-3 * S[0]) and S[kept - 1] > 0:
        best = (U[:, :kept] * S[:kept]) @ Vt[:kept]
        assert np.abs(left @ right - best).max() <= 1e-6 * S[0]
    assert np.allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "columns"), [(9, 9), (4, 30), (30, 4), (1, 8), (8, 1), (1, 1), (70, 50)]
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_full_rank(rows: int, columns: int, share: float) -> None:
    """Square, wide and tall matrices are truncated optimally at every rank."""
    least = min(rows, columns)
    assert_optimal(matrix_of(1, rows, columns, least), max(1, int(share * least)))


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    inner=st.integers(1, 4),
    rank=st.integers(1, 20),
)
@settings(max_examples=50, deadline=None)
def test_any_rank(seed: int, rows: int, columns: int, inner: int, rank: int) -> None:
    """Rank-deficient matrices, and ranks beyond the matrix, are as good as the decomposition."""
    assert_optimal(matrix_of(seed, rows, columns, inner), rank)


def test_rank_deficient_is_recovered() -> None:
    """A matrix of rank 3 comes back from rank 3 to float64's precision."""
    matrix = matrix_of(2, 20, 15, 3).astype(np.float64)
    exact = np.linalg.svd(matrix)
    matrix = (exact[0][:, :3] * exact[1][:3]) @ exact[2][:3]
    left, right, residual = truncate(matrix, 3)
    assert residual < 1e-12
    assert np.abs(left @ right - matrix).max() < 1e-12 * np.abs(matrix).max()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_zero(shape: tuple[int, int]) -> None:
    """A zero matrix gives zero factors and no residual."""
    left, right, residual = truncate(np.zeros(shape, np.float32), 2)
    assert not np.any(left @ right)
    assert residual == 0.0
    assert np.isfinite(left).all()
    assert np.isfinite(right).all()


def test_known_singular_values() -> None:
    """Of diag(5, 3, 1) rank 2 leaves 1 of √35, and rank 1 leaves √10."""
    matrix = np.diag([3.0, 5.0, 1.0])
    left, right, residual = truncate(matrix, 2)
    assert np.allclose(left @ right, np.diag([3.0, 5.0, 0.0]), atol=1e-14)
    assert np.isclose(residual, 1 / np.sqrt(35), rtol=1e-12)
    assert np.isclose(truncate(matrix, 1)[2], np.sqrt(10 / 35), rtol=1e-12)


def test_repeatable_and_input_kept() -> None:
    """The same bytes come out each time, signs included, and the input is not written to."""
    matrix = matrix_of(3, 12, 7, 7)
    matrix.flags.writeable = False
    first, second = truncate(matrix, 4), truncate(matrix, 4)
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()


@settings(deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 12), st.integers(1, 12), st.integers(1, 7), st.integers(1, 9)
)
def test_products_are_truncated_like_matrices(
    seed: int, rows: int, columns: int, inner: int, rank: int
) -> None:
    """Factors never multiplied out give the same spectrum, approximation and residual."""
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(rows, inner)), random.normal(size=(inner, columns))
    U, S, Vt = np.linalg.svd(left @ right, full_matrices=False)
    kept = min(rank, inner, rows, columns)
    best = (U[:, :kept] * S[:kept]) @ Vt[:kept]
    low, high, residual = truncate_product(left, right, rank)
    values = spectrum_of_product(left, right)[1]

    assert np.abs(values - S[: values.size]).max() <= 1e-12 * S[0]
    assert np.abs(low @ high - best).max() <= 1e-10 * S[0]
    assert abs(residual - np.linalg.norm(S[kept:]) / np.linalg.norm(S)) <= 1e-12


@pytest.mark.parametrize("spread", [0, 2, 4, 8, 12])
@pytest.mark.parametrize("parallel", [False, True])
def test_products_of_ill_conditioned_factors(spread: int, parallel: bool) -> None:
    """Factors of columns of very different length, or nearly parallel ones, lose nothing either."""
    random = np.random.default_rng(spread)
    left, right = random.normal(size=(30, 6)), random.normal(size=(6, 20))
    sizes = 10.0 ** -np.linspace(0, spread, 6)
    left = left[:, :1] + left * sizes if parallel else left * sizes
    U, S, Vt = np.linalg.svd(left @ right, full_matrices=False)
    low, high, residual = truncate_product(left, right, 3)

    assert np.abs(low @ high - (U[:, :3] * S[:3]) @ Vt[:3]).max() <= 1e-10 * S[0]
    assert np.abs(spectrum_of_product(left, right)[1] - S[:6]).max() <= 1e-12 * S[0]
    assert abs(residual - np.linalg.norm(S[3:]) / np.linalg.norm(S)) <= 1e-12


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        ([3.0, 1.0], 0.9, 1),
        ([3.0, 1.0], 0.91, 2),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2),
        ([1.0, 1.0, 1.0, 1.0], 1.0, 4),
        ([2.0, 0.0, 0.0], 1.0, 1),
        ([0.0, 0.0], 0.9, 1),
        ([], 0.9, 1),
    ],
)
def test_rank_by_energy(values: list[float], energy: float, rank: int) -> None:
    """The least number of squares that makes up the share, and never none."""
    assert rank_of(np.array(values), energy) == rank
