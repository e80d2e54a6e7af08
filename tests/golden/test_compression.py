"""Compression by hand: ComPEFT's signs and level, and codes of one and two bits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from mergebench.core.tensor import ArrayTensor
from mergebench.ship.measure import cut_of, measure
from mergebench.ship.pieces import Piece
from mergebench.ship.schemes import SCHEMES, Tally, tally_of

V = np.array([0.5, -0.1, 0.05, -0.4, 0.02, 0.0, 0.3, -0.2, 0.01, -0.03])
Q = np.array([-3.0, -1.0, 1.0, 3.0])


def coded(entries: Any, scheme: str, **params: Any) -> tuple[list[int], tuple[float, ...]]:
    """Codes and the numbers of the head, of one tensor."""
    array = ArrayTensor(np.asarray(entries, np.float64))
    piece = Piece("x", array.shape, "F64", array.read)
    with ThreadPoolExecutor(1) as pool:
        sums = measure("input", [piece], pool, lambda _: None)
        chosen = SCHEMES[scheme]
        coder = chosen.settle(
            [piece],
            sums,
            lambda pieces, rank: cut_of(pieces, rank, pool, lambda _: None),
            **chosen.bound(params),
        )["x"]
    around = array.array - coder.mean
    codes = coder.code(around, 0)
    tally = Tally() if scheme == "sparse" else tally_of(codes, around)
    return codes.tolist(), coder.numbers(tally)


def test_compeft_keeps_the_signs_of_the_largest() -> None:
    """Three of ten entries, times the unbiased standard deviation of all ten."""
    codes, (mean, level) = coded(V, "ternary", density=0.3)

    assert codes == [1, 0, 0, -1, 0, 0, 1, 0, 0, 0]
    assert mean == 0
    assert level == pytest.approx(0.247577, abs=5e-7)


def test_the_authors_code_keeps_one_more() -> None:
    """Its threshold is one entry further down."""
    codes, _ = coded(V, "ternary", density=0.3, compat="official")

    assert codes == [1, 0, 0, -1, 0, 0, 1, -1, 0, 0]


def test_the_level_scales_with_alpha() -> None:
    """γ = α · std."""
    _, (_, level) = coded(V, "ternary", density=0.3, alpha=4.0)

    assert level == pytest.approx(4 * 0.247577, abs=2e-6)


def test_the_level_of_least_error_is_the_mean_magnitude() -> None:
    """(.5 + .4 + .3) / 3; no other level is nearer."""
    codes, (_, level) = coded(V, "ternary", density=0.3, level="mse")

    assert level == pytest.approx(0.4)
    errors = [np.sum((V - (level + step) * np.array(codes)) ** 2) for step in (0, 1e-3, -1e-3)]
    assert errors[0] == min(errors)


def test_one_bit_by_conditional_medians() -> None:
    """[-3, -1, 1, 3]: s = 2.58199, ± .6745 s = ± 1.7415."""
    codes, (mean, level) = coded(Q, "one-bit", level="median")

    assert codes == [-1, -1, 1, 1]
    assert mean == 0
    assert level == pytest.approx(1.7415, abs=5e-5)


def test_one_bit_of_least_error() -> None:
    """The mean distance, 2."""
    assert coded(Q, "one-bit") == ([-1, -1, 1, 1], (0.0, 2.0))


def test_one_bit_has_no_third_value() -> None:
    """A zero has a sign too, and the mean may be left out."""
    codes, numbers = coded([0.0, 0.0, 4.0], "one-bit", centre="zero")

    assert codes == [1, 1, 1]
    assert numbers == (0.0, pytest.approx(4 / 3))


def test_two_bits_by_conditional_medians() -> None:
    """.3778 s and 1.2657 s; entries go to the nearer one."""
    codes, numbers = coded(Q, "two-bit", level="median")

    assert codes == [-2, -1, 1, 2]
    assert numbers == pytest.approx((0, 0.3777785 * 2.58200, 1.2656666 * 2.58200), abs=2e-5)


def test_two_bits_of_least_error() -> None:
    """The means of both groups give this tensor back."""
    assert coded(Q, "two-bit") == ([-2, -1, 1, 2], (0.0, 1.0, 3.0))


def test_sparse_keeps_values() -> None:
    """The largest three, rounded to a 127th of the largest."""
    codes, (step,) = coded(V, "sparse", density=0.3, values="int8")

    assert codes == [127, 0, 0, -102, 0, 0, 76, 0, 0, 0]
    assert step == pytest.approx(0.5 / 127)
