"""aTLAS × K against its equation in float64, part by part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergebench import merge_models
from mergebench.core.errors import ParameterError
from tests.oracle.drawn import WORD, digest
from tests.oracle.test_against_oracle import CASES, cases
from tests.oracle.test_drawn import SEEDS, Run


def part(seed: int, name: str, index: int, count: int) -> int:
    """The part that an entry is in: ⌊K u⌋ for the number u of its seed, tensor and index."""
    stream = digest(f"{seed},{digest(name)}")
    word = (stream + (index // 2 + 1) * 0x9E3779B97F4A7C15) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    word ^= word >> 31
    half = (word >> 32) if index % 2 else (word & 0xFFFFFFFF)
    return half * count // 2**32


NUMBERS = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=2, max_size=5)


@given(data=st.data())
@CASES
def test_parts(data: st.DataObject) -> None:
    """Each entry is multiplied by the coefficient of its part, weighted and added."""
    case, seed = data.draw(cases(levels=data.draw(st.booleans()))), data.draw(SEEDS)
    found = data.draw(NUMBERS)
    run = Run(case, "atlas", coefficients="/".join(map(str, found)), seed=seed)
    merged = {}
    for name, deltas in run.tau.items():
        size = np.size(deltas[0])
        each = np.array([found[part(seed, name, j, len(found))] for j in range(size)])
        merged[name] = sum(
            weight * each.reshape(np.shape(delta)) * np.asarray(delta, np.float64)
            for weight, delta in zip(run.case.weights, deltas, strict=True)
        )
    run.assert_is(merged)


def test_parts_sum_to_the_whole() -> None:
    """K masks sum to one: the merges of each part alone add up, and equal numbers are no split."""
    random = np.random.default_rng(0)
    base = {"a.weight": np.zeros((40, 50), np.float32), "b.weight": np.zeros((40, 50), np.float32)}
    tuned = {name: random.integers(-9, 10, (40, 50)).astype(np.float32) for name in base}

    def merged(coefficients: Any, **params: Any) -> Any:
        return merge_models([tuned], base=base, method="atlas", coefficients=coefficients, **params)

    alone = [merged(f"{'0/' * k}1{'/0' * (4 - k)}") for k in range(5)]
    for name in base:
        np.testing.assert_array_equal(sum(each[name] for each in alone), tuned[name])
        shares = [np.count_nonzero(each[name]) / np.count_nonzero(tuned[name]) for each in alone]
        # Five standard deviations of a fifth of 1,900 entries.
        assert shares == pytest.approx([0.2] * 5, abs=0.046)
        np.testing.assert_array_equal(merged("2/2/2")[name], 2 * tuned[name])
    # Tensors of one shape do not share a partition, nor do two seeds.
    assert np.any((alone[0]["a.weight"] != 0) != (alone[0]["b.weight"] != 0))
    assert np.any(merged("0/1", seed=1)["a.weight"] != merged("0/1")["a.weight"])


@pytest.mark.parametrize("text", ["", "a", "1/", "1,2", "1/inf", "nan"])
def test_what_are_no_coefficients(text: str) -> None:
    """Refused before anything is read."""
    tuned = {"w": np.ones(2, np.float32)}
    with pytest.raises(ParameterError, match="coefficients"):
        merge_models([tuned], base=tuned, method="atlas", coefficients=text)


def test_each_model_and_tensor_has_its_own() -> None:
    """As recipes hold what was learned: by model, and by tensor."""
    ones = {name: np.ones(64, np.float32) for name in ("a", "b")}
    base = {name: np.zeros(64, np.float32) for name in ones}
    merged = merge_models(
        [ones, ones],
        base=base,
        method="atlas",
        coefficients={"by_name": {"a": "1/2"}, "else": "3"},
    )
    assert set(np.unique(merged["a"])) == {2.0, 4.0}
    assert set(np.unique(merged["b"])) == {6.0}
    for index in range(64):
        assert merged["a"][index] == 2 * [1, 2][part(0, "a", index, 2)]
