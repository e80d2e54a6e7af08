"""Displacements: tiles of every kind against float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.core.delta import (
    Delta,
    Dense,
    Difference,
    LowRank,
    Replacement,
    factors,
    reads,
    tile,
)
from mergebench.core.errors import FormatError
from mergebench.core.task_vector import TaskVector
from mergebench.core.tensor import DTYPES, ArrayTensor, Tensor, dtype_name, nbytes, read_all
from mergebench.sources import Applied

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Example:
    """A LoRA and the displacement that it is, worked out in float64."""

    delta: LowRank
    exact: np.ndarray


def low_rank(
    seed: int, out: int, into: int, rank: int, dtype: Any = F32, form: str = "plain"
) -> Example:
    """A linear, a transposed or a convolutional LoRA."""
    random = np.random.default_rng(seed)
    scale = 0.75
    kernel = (2, 3) if form == "conv" else ()
    B = random.normal(size=(out, rank, *[1] * len(kernel))).astype(dtype)
    A = random.normal(size=(rank, into, *kernel)).astype(dtype)
    wide = scale * (B.reshape(out, rank).astype(F64) @ A.reshape(rank, -1).astype(F64))
    exact = wide.T if form == "transposed" else wide.reshape(out, into, *kernel)
    delta = LowRank(ArrayTensor(B), ArrayTensor(A), scale, exact.shape, form == "transposed")
    return Example(delta, exact)


SHAPES = st.tuples(st.integers(1, 150), st.integers(1, 9), st.integers(1, 4))
FORMS = st.sampled_from(["plain", "transposed", "conv"])


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=SHAPES,
    form=FORMS,
    factor_dtype=st.sampled_from([F32, BF16, F64]),
    cuts=st.lists(st.floats(0, 1), max_size=6),
    dtype=st.sampled_from([F32, F64]),
)
@settings(max_examples=100, deadline=None)
def test_low_rank_tiles_do_not_depend_on_their_cuts(
    seed: int,
    shape: tuple[int, int, int],
    form: str,
    factor_dtype: Any,
    cuts: list[float],
    dtype: Any,
) -> None:
    """Tiles cut anywhere give, put together, the bits of the whole, which is B A in float64."""
    example = low_rank(seed, *shape, factor_dtype, form)
    size = example.exact.size
    whole = tile(example.delta, 0, size, dtype)
    assert whole.dtype == dtype
    assert whole.shape == (size,)
    bound = 1e-12 if dtype == F64 else 2.0**-24
    error = np.abs(whole.astype(F64) - example.exact.ravel())
    rows = np.abs(example.exact).max(initial=1e-30)
    assert np.all(error <= bound * np.abs(example.exact.ravel()) + 1e-14 * rows)
    places = sorted({0, size, *(int(cut * size) for cut in cuts)})
    pieces = [tile(example.delta, a, b, dtype) for a, b in pairwise(places)]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()


@given(seed=st.integers(0, 2**32 - 1), shape=SHAPES, form=FORMS)
@settings(max_examples=40, deadline=None)
def test_factors_are_those_of_the_stored_orientation(
    seed: int, shape: tuple[int, int, int], form: str
) -> None:
    """The product of the two factors is the flattened displacement as it is stored."""
    example = low_rank(seed, *shape, F32, form)
    left, right = factors(example.delta, F64)
    rank = example.delta.rank
    assert left.shape == (example.exact.shape[0], rank)
    assert right.shape == (rank, prod(example.exact.shape[1:]))
    flat = example.exact.reshape(example.exact.shape[0], -1)
    assert np.allclose(left @ right, flat, rtol=1e-12, atol=1e-13)


def test_tiles_of_nothing() -> None:
    """An empty stretch of any displacement is an empty array, wherever it lies."""
    example = low_rank(0, 70, 3, 2)
    for place in (0, 1, 192, 209, 210):
        assert tile(example.delta, place, place, F32).shape == (0,)


@pytest.mark.parametrize(
    ("stored", "base", "dtype"),
    [(F32, F32, F32), (BF16, BF16, F32), (BF16, F32, F32), (F64, F32, F64)],
    ids=str,
)
def test_differences_are_taken_in_the_wider_dtype(stored: Any, base: Any, dtype: Any) -> None:
    """Both sides are widened before they are subtracted; neither is written to."""
    random = np.random.default_rng(1)
    tuned, origin = (random.normal(size=(3, 4)).astype(each) for each in (stored, base))
    for array in (tuned, origin):
        array.flags.writeable = False
    delta = Difference(ArrayTensor(tuned), ArrayTensor(origin))
    expected = (tuned.astype(dtype) - origin.astype(dtype)).ravel()
    assert tile(delta, 0, 12, dtype).tobytes() == expected.tobytes()
    assert tile(delta, 5, 9, dtype).tobytes() == expected[5:9].tobytes()
    assert delta.shape == (3, 4)


def test_dense_and_replacement() -> None:
    """A dense displacement is its entries; a replacement has no displacement of its own."""
    values = ArrayTensor(np.arange(6, dtype=np.float16).reshape(2, 3))
    assert tile(Dense(values), 2, 5, F32).tolist() == [2, 3, 4]
    with pytest.raises(TypeError, match="no displacement for Replacement"):
        tile(Replacement(values), 0, 6, F32)
    assert Replacement(values).shape == Dense(values).shape == (2, 3)


def test_reads() -> None:
    """Every displacement names the stored tensors that it is made of."""
    one, other = (ArrayTensor(np.zeros((2, 2), F32)) for _ in range(2))
    cases: list[tuple[Delta, tuple[Tensor, ...]]] = [
        (Difference(one, other), (one, other)),
        (Dense(one), (one,)),
        (Replacement(one), (one,)),
        (LowRank(one, other, 1.0, (2, 2)), (one, other)),
    ]
    for delta, expected in cases:
        assert all(a is b for a, b in zip(reads(delta), expected, strict=True))


@given(seed=st.integers(0, 2**32 - 1), shape=SHAPES, form=FORMS, cut=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_applied_adapters_do_not_depend_on_cuts(
    seed: int, shape: tuple[int, int, int], form: str, cut: float
) -> None:
    """A weight with an adapter on top is their sum in float32, however it is read."""
    example = low_rank(seed, *shape, F32, form)
    weight = np.random.default_rng(seed).normal(size=example.exact.shape)
    for stored, dtype in ((BF16, F32), (F32, F32), (F64, F64)):
        array = weight.astype(stored)
        applied = Applied(ArrayTensor(array), example.delta)
        assert (DTYPES[applied.dtype], applied.shape) == (dtype, array.shape)
        whole = applied.read(0, array.size)
        expected = array.astype(dtype).ravel() + example.exact.ravel().astype(dtype)
        assert whole.dtype == dtype
        assert np.allclose(whole, expected, rtol=1e-6, atol=1e-6)
        middle = int(cut * array.size)
        parts = applied.read(0, middle), applied.read(middle, array.size)
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_arrays_of_any_strides_are_read_in_order() -> None:
    """Tensors in memory read in row-major order, as views that cannot be written to."""
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for each in (array, array.T, array[::-1], array[:, ::2], np.asfortranarray(array)):
        tensor = ArrayTensor(each)
        assert np.array_equal(tensor.read(3, 9), each.ravel()[3:9])
        assert np.array_equal(read_all(tensor), each)
        with pytest.raises(ValueError, match="read-only"):
            tensor.read(0, 4)[0] = 9
    assert array.flags.writeable
    assert ArrayTensor(np.array(3.5, np.float16)).read(0, 1).tolist() == [3.5]


def test_dtypes_have_names() -> None:
    """Every readable dtype has its name and size; others are refused with the list of them."""
    for name, dtype in DTYPES.items():
        assert dtype_name(dtype) == name
        assert nbytes(name, (3, 4)) == 12 * dtype.itemsize
    for dtype in (np.dtype(">f4"), np.dtype(np.complex128), np.dtype("U3"), np.dtype(object)):
        with pytest.raises(FormatError, match="no safetensors counterpart"):
            dtype_name(dtype)


def test_task_vectors_are_mappings() -> None:
    """A task vector is a mapping of names to displacements, in the order given."""
    deltas = {name: Dense(ArrayTensor(np.zeros(2, F32))) for name in ("b", "a")}
    vector = TaskVector("label", deltas)
    assert list(vector) == ["b", "a"]
    assert len(vector) == 2
    assert vector["a"] is deltas["a"]
    with pytest.raises(KeyError):
        vector["c"]
