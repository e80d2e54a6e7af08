"""WIDEN worked out by hand."""

from __future__ import annotations

from math import exp
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergebench import merge_models
from mergebench.core.errors import MergebenchError
from tests.helpers.running import assert_done, assert_refused, call

BASE = np.array([[3.0, 0.0], [4.0, 1.0]])
#: Column 0 twice as long; column 1 turned by a right angle.
LONGER, TURNED = np.array([[3.0, 0.0], [4.0, 0.0]]), np.array([[0.0, 1.0], [0.0, -1.0]])
#: Softmax of 0 beside 1/2.
LOW = 1 / (1 + exp(0.5))


def merged(*taus: np.ndarray, name: str = "w", base: np.ndarray = BASE, **params: float) -> list:
    """The merged update."""
    models = [{name: base + tau} for tau in taus]
    got = merge_models(models, base={name: base}, method="widen", **params)[name] - base
    return np.asarray(got).tolist()


def assert_near(got: list, expected: object) -> None:
    """Within 1e-12 of each entry."""
    assert np.shape(got) == np.shape(expected)
    assert np.abs(np.asarray(got) - np.asarray(expected)).max() <= 1e-12, (got, expected)


def test_two_columns() -> None:
    """Lengths rank (1, 0) and (0, 1), directions (0, 1) twice, since equal columns go by index."""
    got = merged(LONGER, TURNED)
    # Column 0 of the first: above its mean by length, beside an equal by direction: (1 + 1/2) / 2.
    assert_near(got, [[0.75 * 3.0, 1.0], [0.75 * 4.0, -1.0]])
    got = merged(LONGER, TURNED, calibration=0.0)
    # What stands above the mean is silenced: 1/2 from the direction of column 0, nothing else.
    assert_near(got, [[0.25 * 3.0, 0.0], [0.25 * 4.0, 0.0]])
    got = merged(LONGER, TURNED, ratio=9.0)
    # Nothing is above nine times the mean: softmax alone.
    first, second = ((1 - LOW) + 0.5) / 2, ((1 - LOW) + 0.5) / 2
    assert_near(got, [[first * 3.0, second], [first * 4.0, -second]])


def test_a_column_out_of_nothing_has_turned() -> None:
    """From zeros counts as a right angle: above a turn by 75 degrees, 1 - cos of which is 0.74."""
    base = np.array([[0.0, 1.0], [0.0, 0.0]])
    angle = np.radians(75.0)
    tau = np.array([[1.0, np.cos(angle) - 1.0], [0.0, np.sin(angle)]])
    got = np.asarray(merged(tau, 0 * tau, base=base))
    # Column 1 is last in the one model and, of equals, first in the other.
    assert_near(got.tolist(), (tau * [1.0, LOW]).tolist())


def test_columns_that_are_equal_but_for_rounding_tie() -> None:
    """Forty columns of the same numbers in other orders rank by index: the later half is above."""
    random = np.random.default_rng(0)
    column, step = random.normal(size=(2, 60))
    orders = [random.permutation(60) for _ in range(40)]
    base = np.stack([column[order] for order in orders], axis=1)
    tau = np.stack([step[order] for order in orders], axis=1)
    got = np.asarray(merged(tau, base=base, calibration=0.0))
    assert np.abs(got[:, 20:]).max() == 0
    assert np.abs(got[:, :20] - tau[:, :20]).max() < 1e-12


def test_one_changed_column_ranks_first() -> None:
    """Of five columns the one that moved counts in full, whatever else the others do."""
    base = np.arange(1.0, 21.0).reshape(4, 5)
    tau = np.zeros((4, 5))
    tau[:, 2] = [1.0, -2.0, 0.5, 3.0]
    others = 1e-9 * np.ones((4, 5))
    got = merged(tau, others, base=base)
    assert np.allclose(np.asarray(got)[:, 2], tau[:, 2], rtol=1e-8)


def test_vectors_are_scored_by_entry() -> None:
    """|τ| = (1, 3) and (0, 2): the second entries are above their means, the first compete."""
    base = np.array([1.0, 1.0])
    got = merged(np.array([1.0, -3.0]), np.array([0.0, 2.0]), base=base)
    assert_near(got, [1.0 / (1 + exp(-1.0)), -3.0 + 2.0])


def test_tokens_of_embeddings() -> None:
    """Of an embedding a token is one unit: the matrix above, turned."""
    got = merged(LONGER.T, TURNED.T, name="model.embed_tokens.weight", base=BASE.T)
    assert_near(got, np.transpose([[0.75 * 3.0, 1.0], [0.75 * 4.0, -1.0]]))


def test_degenerate_task_vectors() -> None:
    """One model comes out; zeros leave the base; opposite ones are weighed alike and cancel."""
    assert_near(merged(LONGER), LONGER)
    assert_near(merged(0 * LONGER, 0 * LONGER), 0 * LONGER)
    assert_near(merged(0 * LONGER, LONGER), merged(LONGER, 0 * LONGER))
    # Entries that move alike have equal scores.
    bias = np.array([2.0, -2.0])
    assert_near(merged(bias, -bias, base=np.zeros(2)), [0.0, 0.0])
    assert_near(merged(2 * LONGER, base=0 * BASE), 2 * LONGER)
    assert_near(merged(np.array(2.0), np.array(2.0), base=np.array(1.0)), 2.0)


def test_bad_parameters_and_missing_base(tmp_path: Path) -> None:
    """Bounds are declared, and a base is needed, also by adapters."""
    with pytest.raises(MergebenchError, match="`ratio` must be a number >= 0"):
        merged(LONGER, ratio=-1.0)
    with pytest.raises(MergebenchError, match="add --base"):
        merge_models([{"w": BASE}], method="widen")
    for name, array in (("a", LONGER), ("b", TURNED)):
        save_file({"w": (BASE + array).astype(np.float32)}, tmp_path / f"{name}.safetensors")
    save_file({"w": BASE.astype(np.float32)}, tmp_path / "base.safetensors")
    common = ("merge", "a.safetensors", "b.safetensors", "-m", "widen", "-o", "out.safetensors")
    assert_refused(call(*common, cwd=tmp_path), "--base")
    assert not (tmp_path / "out.safetensors").exists()
    assert_done(call(*common, "-b", "base.safetensors", cwd=tmp_path))
    got = load_file(tmp_path / "out.safetensors")["w"] - BASE
    assert np.allclose(got, [[2.25, 1.0], [3.0, -1.0]], atol=1e-6)
