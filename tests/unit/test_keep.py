"""Masks of ranks within rows and of cuts within tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.compute.cut import ALL, NONE, Cut
from mergebench.compute.keep import keep_mask, row_ranks_mask
from mergebench.compute.masking import silence


def by_sorting(stack: np.ndarray, row: int, low: int, high: int) -> np.ndarray:
    """Ranks within rows by one stable sort each."""
    lines = np.abs(stack).reshape(-1, row)
    order = np.argsort(-lines, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(1, row + 1)[None, :].repeat(len(lines), 0), axis=1)
    return ((ranks > low) & (ranks <= high)).reshape(stack.shape)


@given(
    seed=st.integers(0, 2**32 - 1),
    models=st.integers(1, 3),
    rows=st.integers(0, 6),
    row=st.integers(1, 9),
    levels=st.sampled_from([0, 1, 2, 1000]),
    low=st.integers(-1, 10),
    high=st.integers(-1, 11),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=150, deadline=None)
def test_ranks_within_rows(
    seed: int, models: int, rows: int, row: int, levels: int, low: int, high: int, dtype: type
) -> None:
    """Exactly the entries of rank low < rank <= high, the earlier of equals first."""
    random = np.random.default_rng(seed)
    stack = random.integers(-levels, levels + 1, (models, rows * row)).astype(dtype)
    expected = by_sorting(stack, row, low, high)
    got = row_ranks_mask(stack, row, low, high)
    assert got.dtype == np.bool_
    assert np.array_equal(got, expected)
    with_torch = row_ranks_mask(torch.from_numpy(stack), row, low, high)
    assert with_torch.dtype == torch.bool
    assert np.array_equal(with_torch.numpy(), expected)


@pytest.mark.parametrize("row", [1, 3])
def test_ranks_of_no_entries(row: int) -> None:
    """A stack without entries has an empty mask, whatever the length of its rows."""
    assert row_ranks_mask(np.zeros((2, 0), np.float32), row, 0, 1).shape == (2, 0)
    assert row_ranks_mask(np.zeros((2, 0), np.float32), 0, 0, 1).shape == (2, 0)
    assert row_ranks_mask(torch.zeros(2, 0), 0, 0, 1).shape == (2, 0)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("start", [0, 2, 3, 5])
def test_cuts_within_a_tile(library: str, start: int) -> None:
    """Ties before the place of the cut stay, later ones go, whichever tile they are in."""
    whole = np.array([[2, -1, 1, 3, -1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1]], np.float32)
    cuts = [Cut(1.0, b"w", 4), Cut(1.0, b"w", 2)]
    expected = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]], bool)
    tile = whole[:, start:]
    got = keep_mask(tile if library == "numpy" else torch.from_numpy(tile), cuts, "w", start)
    assert np.array_equal(np.asarray(got), expected[:, start:])


def test_cuts_of_other_tensors() -> None:
    """In tensors before the cut's all ties stay, in tensors after it none."""
    stack = np.array([[1, -2, 0.5]], np.float32)
    cut = [Cut(1.0, b"m", 0)]
    assert keep_mask(stack, cut, "a", 0).tolist() == [[True, True, False]]
    assert keep_mask(stack, cut, "z", 0).tolist() == [[False, True, False]]
    assert keep_mask(stack, [ALL], "a", 0).all()
    assert not keep_mask(stack, [NONE], "a", 0).any()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_threshold_between_two_float32(library: str) -> None:
    """Float32 entries are compared with a float64 threshold as the numbers that both are."""
    above, below = np.float32(0.1), np.float32(0.7)  # each the nearest to its decimal fraction
    assert above > np.float64(0.1)
    assert below < np.float64(0.7)
    stack = np.array([[above, below, -above, np.nextafter(above, np.float32(0))]])
    tile = stack if library == "numpy" else torch.from_numpy(stack)
    assert keep_mask(tile, [Cut(0.1, b"a", 0)], "b", 0).tolist() == [[True, True, True, False]]
    assert not keep_mask(tile, [Cut(0.7, b"b", 9)], "b", 0).any()
    assert not keep_mask(tile, [Cut(1e300, b"b", 9)], "b", 0).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_silence_keeps_and_zeroes(dtype: type) -> None:
    """What the mask keeps is bitwise what it was, the rest is zero; the input stays."""
    stack = np.array([[1.5, -2.5, -0.0, 1e-45 if dtype is np.float32 else 5e-324]], dtype)
    stack.flags.writeable = False
    mask = np.array([[True, False, True, True]])
    got = silence(stack, mask)
    assert got.dtype == dtype
    assert got[mask].tobytes() == stack[mask].tobytes()
    assert np.all(got[~mask] == 0)
    tensor = silence(torch.from_numpy(stack.copy()), torch.from_numpy(mask))
    assert np.array_equal(tensor.numpy(), got)
