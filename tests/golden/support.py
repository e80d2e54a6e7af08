"""Merges of a single tensor ``w`` into a base of zeros, with exact results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergebench import merge_models

Entries = float | Sequence[Any]


def merged(method: str, *vectors: Entries, weights: Sequence[float] = (), **params: Any) -> Any:
    """The merged task vector of some task vectors, as a number or nested lists."""
    tables = [{"w": np.array(vector, np.float32)} for vector in vectors]
    shares = weights or (1.0,) * len(tables)
    base = {"w": np.zeros_like(tables[0]["w"])}
    pairs = list(zip(tables, shares, strict=True))
    return merge_models(pairs, base=base, method=method, **params)["w"].tolist()


def assert_exactly(got: Any, expected: Any) -> None:
    """Equal numbers, negative zero equal to zero; the same nesting."""
    assert got == expected, (got, expected)
