"""Rounding to stored dtypes: to nearest, ties to even, once, and never to infinity unsaid."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.compute.masking import moved
from mergebench.compute.rounding import round_to
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import DTYPES

#: dtype -> bits of the significand, the hidden one included.
SMALL = {"BF16": 8, "F16": 11, "F8_E4M3": 4, "F8_E5M2": 3, "F32": 24}


def assert_nearest(number: float, rounded: float, bits: int) -> None:
    """No number of that many bits is nearer, and of two equally near ones the even one is taken."""
    fraction, exponent = np.frexp(number)
    # Scaled by a power of two both neighbours are integers, and Python's round goes to even.
    expected = np.ldexp(float(round(float(np.ldexp(fraction, bits)))), int(exponent) - bits)
    assert rounded == expected, (number, rounded, expected)


@pytest.mark.parametrize("wide", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
@given(number=st.floats(0.25, 200.0), sign=st.sampled_from([1, -1]))
@settings(max_examples=50, deadline=None)
def test_rounds_to_nearest(dtype: str, wide: Any, number: float, sign: int) -> None:
    """Numbers well within the range of a dtype go to the nearest that it can hold."""
    value = float(wide(sign * number))
    got = round_to(np.array([value], wide), dtype, "w")
    assert got.dtype == DTYPES[dtype]
    assert_nearest(value, float(got[0]), SMALL[dtype])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2", "F32"])
@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_float64_is_rounded_once(dtype: str, beside: int) -> None:
    """A float64 just beside the middle of two numbers goes to its side, not to the even one."""
    bits = SMALL[dtype]
    for step in (0, 1):
        low = 1 + step * 2.0 ** (1 - bits)
        middle = low + 2.0**-bits
        value = middle + beside * 2.0**-50
        got = float(round_to(np.array([value]), dtype, "w")[0])
        assert_nearest(value, got, bits)


@pytest.mark.parametrize("wide", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [
        ("F16", 65504.0, 65520.0),
        ("BF16", float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), 3.4e38),
        ("F8_E4M3", 448.0, 500.0),
        ("F8_E5M2", 57344.0, 65000.0),
    ],
)
def test_overflow_names_tensor_and_number(
    dtype: str, largest: float, beyond: float, wide: Any
) -> None:
    """The largest number of a dtype passes; larger ones are an error that counts them."""
    assert float(round_to(np.array([-largest], wide), dtype, "w")[0]) == -largest
    with pytest.raises(MergebenchError) as caught:
        round_to(np.array([1.0, -beyond, largest, beyond], wide), dtype, "layer.weight")
    size = f"{float(np.abs(np.array(beyond, wide))):g}"
    assert caught.value.what == (
        f"layer.weight: 2 values do not fit {dtype.lower()}, the largest is {size}"
    )


def test_overflow_of_float32_from_float64() -> None:
    """A float64 beyond float32 is an error too, and its own dtype holds it."""
    with pytest.raises(MergebenchError, match=r"^w: 1 values do not fit f32"):
        round_to(np.array([1.0, 1e39]), "F32", "w")
    assert round_to(np.array([1e39]), "F64", "w")[0] == 1e39


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("wide", [np.float32, np.float64], ids=["float32", "float64"])
def test_infinite_results_are_refused(wide: Any, dtype: str) -> None:
    """Arithmetic that ran out of range is an error in any dtype, never a stored infinity."""
    for bad in (np.inf, -np.inf, np.nan):
        with pytest.raises(MergebenchError, match=r"^layer\.weight: "):
            round_to(np.array([1.0, bad], wide), dtype, "layer.weight")


def test_shape_is_kept() -> None:
    """Any shape comes out as it went in, without entries too."""
    for shape in ((), (0,), (2, 0, 3), (2, 3)):
        assert round_to(np.ones(shape, np.float32), "BF16", "w").shape == shape


NUMBERS = st.floats(-8, 8, width=32) | st.sampled_from([0.0, -0.0])


@given(base=st.lists(NUMBERS, min_size=1, max_size=9), data=st.data())
@settings(max_examples=100, deadline=None)
def test_adding_nothing_keeps_the_bits(base: list[float], data: st.DataObject) -> None:
    """Where the displacement is zero the base's bits stay; elsewhere it is the sum."""
    under = np.array(base, np.float32)
    delta = np.array(
        data.draw(st.lists(NUMBERS, min_size=len(base), max_size=len(base))), np.float32
    )
    before = under.copy(), delta.copy()
    total = moved(under, delta)
    assert total[delta == 0].tobytes() == under[delta == 0].tobytes()
    assert np.array_equal(total, under + delta)
    assert under.tobytes() == before[0].tobytes()
    assert delta.tobytes() == before[1].tobytes()
