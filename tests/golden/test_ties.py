"""TIES-Merging, worked out by hand; τ1 and τ2 are those of the specification."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergebench import apply, merge_models
from mergebench.merge.ops.trim import trim

from .support import assert_exactly, merged

TAU_1 = [3.0, -1.0, 0.5, 2.0, -4.0]
TAU_2 = [-2.0, -1.5, 0.2, 2.0, 4.0]
BOTH = (TAU_1, TAU_2)


@pytest.mark.parametrize(
    ("divisor", "expected"),
    [
        ("count", [3, -1.25, 0, 2, 4]),
        ("none", [3, -2.5, 0, 4, 4]),
        ("max", [3, -1.5, 0, 2, 4]),
    ],
)
def test_official_keeps_four_of_each(divisor: str, expected: list[float]) -> None:
    """⌊.6 · 5⌋ + 1 = 4 stay; -4 and 4 tie and follow the majority, which is positive."""
    got = merged("ties", *BOTH, density=0.6, compat="official", divisor=divisor)
    assert_exactly(got, expected)


def test_official_mask_has_four_entries() -> None:
    """The threshold of τ1 is 1 and of τ2 is 1.5, with what equals them kept."""
    kept = apply(trim(0.6, "model", "official"), [np.array(tau) for tau in BOTH])
    assert_exactly([each.tolist() for each in kept], [[3, -1, 0, 2, -4], [-2, -1.5, 0, 2, 4]])


def test_exact_mask_has_three_entries() -> None:
    """⌊.6 · 5⌋ = 3 stay, the earlier of equals first."""
    kept = apply(trim(0.6, "tensor"), [np.array(tau) for tau in BOTH])
    assert_exactly([each.tolist() for each in kept], [[3, 0, 0, 2, -4], [-2, 0, 0, 2, 4]])


@pytest.mark.parametrize("settings", [{"compat": "mergekit-0.1.5"}, {"compat": "peft-0.21"}, {}])
def test_exact_top_three_with_unit_weights(settings: dict[str, Any]) -> None:
    """mergekit, PEFT and the defaults agree where the weights are 1."""
    assert_exactly(merged("ties", *BOTH, density=0.6, **settings), [3, 0, 0, 2, 4])


@pytest.mark.parametrize(
    ("compat", "expected"),
    [("mergekit-0.1.5", [3, 0, 0, 2, -4]), ("peft-0.21", [3, 0, 0, 1.5, 2])],
)
def test_weights_elect_in_mergekit_and_only_scale_in_peft(
    compat: str, expected: list[float]
) -> None:
    """With weights 1 and .5 the last entry is -4 where they vote and 4 · .5 where they do not."""
    got = merged("ties", *BOTH, weights=(1.0, 0.5), density=0.6, compat=compat)
    assert_exactly(got, expected)


def test_fusionbench_sums_and_scales() -> None:
    """The preset keeps four, sums, and scales by .3."""
    got = merged("ties", *BOTH, density=0.6, compat="fusionbench")
    lam = np.float32(0.3)
    assert_exactly(got, [float(np.float32(x) * lam) for x in (3, -2.5, 0, 4, 4)])


@pytest.mark.parametrize("compat", ["official", "mergekit-0.1.5", "peft-0.21", None])
def test_everything_of_one_model_is_that_model(compat: str | None) -> None:
    """ρ = 1, N = 1 and λ = 1 is the identity in every preset that divides."""
    assert_exactly(merged("ties", TAU_1, density=1.0, compat=compat), TAU_1)


@pytest.mark.parametrize(
    ("tie", "expected"),
    [("plus", [1, 5, 7]), ("minus", [-1, 5, 7]), ("zero", [0, 5, 7]), ("majority", [1, 5, 7])],
)
def test_sums_of_zero(tie: str, expected: list[float]) -> None:
    """1 and -1 cancel: each rule says which of them stays."""
    assert_exactly(merged("ties", [1, 4, 7], [-1, 6, 7], density=1.0, tie=tie), expected)


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        (([1, -4, -7, 2], [-1, -6, -7, 2]), [-1, -5, -7, 2]),  # elected signs sum to -1
        (([1, -4, 2], [-1, -6, 2]), [-1, -5, 2]),  # they sum to 0, which counts as negative
        (([1, 4, 2], [-1, 6, 2]), [1, 5, 2]),
    ],
)
def test_majority_is_the_sign_of_all_elected_signs(
    vectors: tuple[list[float], ...], expected: list[float]
) -> None:
    """An entry that sums to zero takes the sign of the sum of elected signs; zero is negative."""
    assert_exactly(merged("ties", *vectors, density=1.0), expected)


def test_majority_counts_over_all_tensors() -> None:
    """The tensors of a model elect one majority together."""
    models = [
        {"a": np.array([1.0], np.float32), "b": np.array([-3.0, -3.0], np.float32)},
        {"a": np.array([-1.0], np.float32), "b": np.array([-3.0, -5.0], np.float32)},
    ]
    base = {name: np.zeros_like(array) for name, array in models[0].items()}
    got = merge_models(models, base=base, method="ties", density=1.0)
    assert_exactly({name: got[name].tolist() for name in got}, {"a": [-1], "b": [-3, -4]})


def test_mass_and_count_elect_differently() -> None:
    """5 outweighs -2 and -1 by mass, and is outvoted by count."""
    assert_exactly(merged("ties", [5.0], [-2.0], [-1.0], density=1.0, sign="mass"), [5])
    assert_exactly(merged("ties", [5.0], [-2.0], [-1.0], density=1.0, sign="count"), [-1.5])


@pytest.mark.parametrize(
    ("count", "density", "expected"),
    [
        ("exact", 0.5, [3, 0, 2, 0]),  # of two equal magnitudes the earlier is kept
        ("official", 0.5, [3, 0, 2, -2]),  # the threshold is 2, and both reach it
        ("official", 0.25, [3, 0, 2, -2]),
        ("official", 0.2, [3, 0, 0, 0]),
        ("official", 1.0, [3, 1, 2, -2]),
        ("exact", 0.2, [0, 0, 0, 0]),
        ("at_least_one", 0.2, [3, 0, 0, 0]),
        ("exact", 1.0, [3, 1, 2, -2]),
    ],
)
@pytest.mark.parametrize("scope", ["row", "tensor", "model"])
def test_how_many_are_kept(scope: str, count: str, density: float, expected: list[float]) -> None:
    """Each count on [3, 1, 2, -2], where a vector is its own row, tensor and model."""
    got = merged("ties", [3, 1, 2, -2], density=density, count=count, scope=scope)
    assert_exactly(got, expected)


@pytest.mark.parametrize(
    ("scope", "a", "b"),
    [
        ("row", [[0, 2], [0, 4]], [0, 6]),
        ("tensor", [[0, 0], [3, 4]], [0, 6]),
        ("model", [[0, 0], [0, 4]], [5, 6]),
    ],
)
def test_scopes(scope: str, a: list[list[float]], b: list[float]) -> None:
    """Half of each row, of each tensor, or of the model: the largest magnitudes of each."""
    tau = {
        "b": np.array([5.0, 6.0], np.float32),
        "a": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
    }
    base = {name: np.zeros_like(array) for name, array in tau.items()}
    got = merge_models([tau], base=base, method="ties", density=0.5, scope=scope)
    assert_exactly((got["a"].tolist(), got["b"].tolist()), (a, b))


def test_equals_are_ordered_by_the_bytes_of_their_names() -> None:
    """'B' comes before 'a' in bytes, whatever the order in the model."""
    tau = {"a": np.array([2.0], np.float32), "B": np.array([2.0], np.float32)}
    base = {name: np.zeros_like(array) for name, array in tau.items()}
    got = merge_models([tau], base=base, method="ties", density=0.5)
    assert_exactly({name: got[name].tolist() for name in got}, {"a": [0], "B": [2]})


@pytest.mark.parametrize(("cancelled", "expected"), [("zero", [0.0]), ("sum", [5.0])])
def test_agreeing_weights_that_cancel(cancelled: str, expected: list[float]) -> None:
    """3 and -2 with weights 1 and -1 both vote +, and their weights sum to zero."""
    got = merged(
        "ties", [3], [-2], weights=(1.0, -1.0), density=1.0, election="weighted",
        divisor="weights", cancelled=cancelled,
    )  # fmt: skip
    assert_exactly(got, expected)


def test_scaling_all_task_vectors_scales_the_result() -> None:
    """Twice τ1 and τ2 give twice [3, -1.25, 0, 2, 4]."""
    doubled = [[2 * x for x in tau] for tau in BOTH]
    got = merged("ties", *doubled, density=0.6, compat="official")
    assert_exactly(got, [6, -2.5, 0, 4, 8])
