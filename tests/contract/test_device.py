"""Merges on a device: the path of accelerators, here on the processor, and on one if there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.merge.chains import tolerance_of
from mergebench.merge.method import METHODS

from .assertions import assert_close, assert_same_bits, assert_within_ulps
from .support import BF16, F16, F32, FEW, GENERIC, Case, cases, drawn, every_method, merged, taken

#: What kernels and devices do alike, to the bit: differences, thresholds, random masks, sums.
SAME = (
    "linear",
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "dare",
    "dare_ties",
    "magnitude_prune",
)
CUDA = torch.cuda.is_available()


def assert_device_agrees(method: str, case: Case, params: Any, device: str) -> None:
    """A merge on a device is that of the processor, within 1e-6 or the method's tolerance."""
    expected = merged(method, case, params)
    got = merged(method, case, params, device=device)
    assert set(got) == set(expected)
    assert_close(got, expected, max(tolerance_of(METHODS[method](**params)), 1e-6))


@every_method("device")
@given(data=st.data())
@settings(GENERIC, max_examples=8)
def test_a_device_gives_the_same(method: str, data: st.DataObject) -> None:
    """Through torch, with whole rows and tensors in a tile, come the values of the ops."""
    case = data.draw(cases(kinds=("normal",), limits=taken(method)))
    assert_device_agrees(method, case, drawn(data, method), "torch")


@pytest.mark.parametrize("method", SAME)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@given(data=st.data())
@FEW
def test_masks_and_roundings_are_the_same(method: str, dtype: Any, data: st.DataObject) -> None:
    """Where nothing but single operations is done the bits are the same, ties included."""
    case, params = data.draw(cases(dtype)), drawn(data, method)
    assert_same_bits(merged(method, case, params, device="torch"), merged(method, case, params))


@pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")
@every_method("device")
@given(data=st.data())
@settings(GENERIC, max_examples=4)
def test_cuda_gives_the_same(method: str, data: st.DataObject) -> None:
    """On a CUDA device too."""
    case = data.draw(cases(kinds=("normal",), limits=taken(method)))
    assert_device_agrees(method, case, drawn(data, method), "cuda")


@pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("method", SAME)
def test_cuda_draws_and_cuts_the_same(method: str) -> None:
    """Masks are identical on a CUDA device, with several tiles of several workers."""
    random = np.random.default_rng(3)
    base = {"w": random.normal(size=(700, 3001)).astype(BF16)}
    models = [
        {"w": (base["w"].astype(F32) + random.normal(size=(700, 3001)) / 50).astype(BF16)}
        for _ in range(3)
    ]
    case = Case(base, tuple(models), (1.0, 0.5, 2.0))
    got, expected = (
        merged(method, case, {}, device=device, workers=3)["w"] for device in ("cuda", "cpu")
    )
    assert np.array_equal(got == base["w"], expected == base["w"])
    assert_within_ulps(got, expected)
