"""Comparisons of arrays and of dictionaries of arrays; every one of them fails when it must."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


def assert_same_layout(got: Arrays, expected: Arrays) -> None:
    """The same names with the same dtypes and shapes."""
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, (name, got[name].dtype, array.dtype)
        assert got[name].shape == array.shape, (name, got[name].shape, array.shape)


def assert_same_bits(got: Arrays, expected: Arrays) -> None:
    """The same names, dtypes, shapes and bytes: -0 is not 0."""
    assert_same_layout(got, expected)
    for name, array in expected.items():
        assert got[name].tobytes() == array.tobytes(), (name, got[name], array)


def assert_same_values(got: Arrays, expected: Arrays) -> None:
    """The same names, dtypes, shapes and numbers: -0 equals 0."""
    assert_same_layout(got, expected)
    for name, array in expected.items():
        assert np.array_equal(got[name], array), (name, got[name], array)


def assert_close(got: Arrays, expected: Arrays, relative: float, least: float = 0.0) -> None:
    """Each tensor within ``relative`` of the largest magnitude in it, or of ``least`` if larger."""
    assert set(got) == set(expected)
    for name, array in expected.items():
        wide = np.asarray(array, np.float64)
        assert np.shape(got[name]) == wide.shape, name
        error = np.abs(np.asarray(got[name], np.float64) - wide).max(initial=0.0)
        bound = relative * np.abs(wide).max(initial=least)
        assert error <= bound, (name, error, bound)


def assert_within_ulps(got: Any, expected: Any, ulps: int = 1) -> None:
    """Entry by entry within some units in the last place of ``expected``; zeros in equal places."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype, (got.dtype, expected.dtype)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert np.array_equal(got == 0, expected == 0), (got, expected)
    error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    assert np.all(error <= ulps * np.spacing(np.abs(expected)).astype(np.float64)), error
