"""Comparisons that name the tensor that is off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.helpers.files import Array


def assert_same(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def assert_close(
    actual: Mapping[str, Any], expected: Mapping[str, Any], relative: float = 1e-6
) -> None:
    """The same names and shapes, each tensor within a share of its largest expected value."""
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        wanted = np.asarray(array, np.float64)
        got = np.asarray(actual[name], np.float64)
        assert got.shape == wanted.shape, name
        limit = relative * np.abs(wanted).max(initial=0.0)
        error = np.abs(got - wanted).max(initial=0.0)
        assert error <= limit, f"{name}: off by {error}, allowed {limit}"


def assert_files(actual: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    """The same files with the same bytes."""
    assert sorted(actual) == sorted(expected)
    different = [name for name, content in expected.items() if actual[name] != content]
    assert different == []
