"""Sums and ranks that do not depend on tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergebench.compute.ranks import by_row_rank
from mergebench.compute.rescaling import norm_ratios
from mergebench.compute.sums import BLOCK, totals
from tests.unit.sweeps import Tables

RANDOM = np.random.default_rng(3)
STACKS = {
    "b": RANDOM.normal(size=(2, 3 * BLOCK + 17)).astype(np.float32) * np.float32(1e6),
    "a": RANDOM.normal(size=(2, 100)).astype(np.float32),
    "c": RANDOM.normal(size=(2, BLOCK)).astype(np.float32),
    "d": np.zeros((2, 0), np.float32),
}


def squares(stack: Any, at: Any) -> Any:
    """Three rows: both squares and the product."""
    one, other = stack[0:1, :], stack[1:2, :]
    rows = [one * one, other * other, one * other]
    return np.concatenate(rows) if isinstance(stack, np.ndarray) else torch.cat(rows)


@pytest.mark.parametrize("tile", [1, 7, 100, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1 << 20])
def test_tiles_do_not_change_a_bit(tile: int) -> None:
    """Any tile gives the bits of one big tile, which are right to float64's precision."""
    whole = totals(Tables(STACKS, 1 << 30), squares, 3)
    assert totals(Tables(STACKS, tile), squares, 3).tobytes() == whole.tobytes()
    flat = np.concatenate([STACKS[name] for name in "abcd"], axis=1)
    expected = [float(np.sum(row.astype(np.float64))) for row in squares(flat, None)]
    assert np.allclose(whole, expected, rtol=1e-12)


def test_no_entries_sum_to_zero() -> None:
    """A sweep over nothing gives as many zeros as there are rows."""
    empty = {"a": np.zeros((2, 0), np.float32)}
    assert totals(Tables(empty), squares, 3).tolist() == [0.0, 0.0, 0.0]
    assert norm_ratios(Tables(empty), lambda stack, at: stack).tolist() == [1.0, 1.0]


def test_torch_sums_have_gradients() -> None:
    """On torch tensors the sums are those of numpy, and derivatives pass."""
    stacks = {name: torch.tensor(each, requires_grad=True) for name, each in STACKS.items()}
    got = totals(Tables(stacks, 1 << 30), squares, 3)
    expected = totals(Tables(STACKS), squares, 3)
    assert np.allclose(got.detach().numpy(), expected, rtol=1e-12)
    got[0].backward()
    assert torch.equal(stacks["a"].grad[0], 2 * stacks["a"][0])


def test_ratios_of_norms() -> None:
    """Ratios restore L1 norms; 1 where nothing is left to be multiplied."""
    stacks = {"a": np.array([[1.0, -2, 3, 4], [1, 1, 1, 1]], np.float32)}

    def change(stack: Any, at: Any) -> Any:
        return stack * np.array([[1, 0, 1, 0], [0, 0, 0, 0]], np.float32)

    assert norm_ratios(Tables(stacks), change).tolist() == [2.5, 1.0]


TABLE = np.array([10.0, 20.0, 30.0, 40.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_ranks_within_rows(dtype: Any, library: str) -> None:
    """Magnitudes rank within their rows; of equals the later ranks lower, negative zeros too."""
    stack = np.array([[1, -3, 2, -4, 0, -0.0, 5, -5], [2, 2, 2, 2, 1, -2, 2, 1]], dtype)
    given = torch.tensor(stack) if library == "torch" else stack
    got = np.asarray(by_row_rank(given, 4, TABLE))
    expected = [[10, 30, 20, 40, 20, 10, 40, 30], [40, 30, 20, 10, 20, 40, 30, 10]]
    assert got.dtype == np.float64
    assert got.tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_of_random_rows(dtype: Any) -> None:
    """Of levels and of numbers far apart the ranks are those of a stable sort, row by row."""
    exponents = RANDOM.integers(-120, 120, (3, 60))
    levels = np.round(RANDOM.normal(size=(3, 60)), 1) * 2.0**exponents
    levels[:, ::7] = np.round(RANDOM.normal(size=levels[:, ::7].shape))
    stack = levels.astype(dtype)
    got = by_row_rank(stack, 12, np.arange(12.0))
    for row, ranks in zip(stack.reshape(-1, 12), got.reshape(-1, 12), strict=True):
        falling = sorted(range(12), key=lambda place: (-abs(row[place]), place))
        assert [int(ranks[place]) for place in falling] == list(range(11, -1, -1))


def test_rows_of_one_and_of_none() -> None:
    """A row of one has its table's only value; without entries there are no ranks."""
    assert by_row_rank(np.ones((2, 3), np.float32), 1, np.array([0.5])).tolist() == [[0.5] * 3] * 2
    assert by_row_rank(np.ones((2, 0), np.float32), 0, np.zeros(0)).shape == (2, 0)
