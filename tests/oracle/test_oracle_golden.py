"""The reference implementations against results worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.oracle import methods

TAU_1 = [3.0, -1.0, 0.5, 2.0, -4.0]
TAU_2 = [-2.0, -1.5, 0.2, 2.0, 4.0]


def deltas(*vectors: Any) -> dict[str, list[np.ndarray]]:
    """Return one tensor ``w`` with a task vector per argument."""
    return {"w": [np.array(vector, np.float64) for vector in vectors]}


def merged(method: Any, *vectors: Any, **settings: Any) -> Any:
    """Return what ``method`` makes of the single tensor ``w``, as a number or nested lists."""
    return method(deltas(*vectors), **settings)["w"].tolist()


# Averages


def test_linear_is_the_mean_by_default() -> None:
    assert merged(methods.linear, [1, 2], [3, 6]) == [2, 4]


@pytest.mark.parametrize(
    ("normalize", "expected"), [(True, [2.5, 5.0]), (False, [2.5 * 4, 5.0 * 4])]
)
def test_linear_weights(normalize: bool, expected: list[float]) -> None:
    result = merged(methods.linear, [1, 2], [3, 6], weights=(1, 3), normalize=normalize)
    assert result == expected


def test_task_arithmetic_adds_weighted_task_vectors() -> None:
    base = {"w": np.array([10.0, 20.0])}
    models = {"w": [np.array([11.0, 22.0]), np.array([8.0, 20.0])]}
    tau = methods.task_vectors(base, models)
    assert [vector.tolist() for vector in tau["w"]] == [[1, 2], [-2, 0]]
    total = methods.task_arithmetic(tau, weights=(1.0, -0.5))
    assert total["w"].tolist() == [2, 2]
    assert methods.apply_to_base(base, total, lam=0.5)["w"].tolist() == [11, 21]


def test_task_vectors_are_subtracted_in_float32() -> None:
    base = {"w": np.array([1.0], np.float32)}
    models = {"w": [np.array([np.float32(1e-9)])]}
    assert methods.task_vectors(base, models)["w"][0].tolist() == [-1.0]


# TIES

OFFICIAL: dict[str, Any] = {"density": 0.6}


@pytest.mark.parametrize(
    ("divisor", "expected"),
    [
        ("count", [3, -1.25, 0, 2, 4]),
        ("none", [3, -2.5, 0, 4, 4]),
        ("max", [3, -1.5, 0, 2, 4]),
    ],
)
def test_ties_official_keeps_four_of_each(divisor: str, expected: list[float]) -> None:
    mask = methods.ties_mask(deltas(TAU_1, TAU_2), 0.6, "model", "official")
    assert mask.tolist() == [[True, True, False, True, True]] * 2
    assert merged(methods.ties, TAU_1, TAU_2, density=0.6, divisor=divisor) == expected


def test_ties_exact_keeps_three_of_each() -> None:
    mask = methods.ties_mask(deltas(TAU_1, TAU_2), 0.6, "tensor", "exact")
    assert mask.tolist() == [[True, False, False, True, True]] * 2
    result = merged(methods.ties, TAU_1, TAU_2, density=0.6, count="exact", tie="plus")
    assert result == [3, 0, 0, 2, 4]


def test_ties_weights_elect_in_mergekit_and_only_scale_in_peft() -> None:
    settings: dict[str, Any] = {"density": 0.6, "weights": (1.0, 0.5)}
    assert merged(methods.ties_mergekit, TAU_1, TAU_2, **settings) == [3, 0, 0, 2, -4]
    assert merged(methods.ties_peft, TAU_1, TAU_2, **settings) == [3, 0, 0, 1.5, 2]


def test_ties_mergekit_without_normalization_sums() -> None:
    result = merged(
        methods.ties_mergekit, TAU_1, TAU_2, density=0.6, weights=(1, 0.5), normalize=False
    )
    assert result == [3, 0, 0, 3, -4]


def test_ties_mergekit_negative_weight_can_undo_its_own_sign() -> None:
    # At entry 0 only the negated second model votes, and -0.5 * 2 / -0.5 is 2 again.
    result = merged(methods.ties_mergekit, [0, 1], [2, 1], density=1.0, weights=(1.0, -0.5))
    assert result == [2, 1]


@pytest.mark.parametrize(("zero_divisor", "expected"), [("zero", 0.0), ("one", 5.0)])
def test_ties_weights_of_agreeing_models_that_cancel(zero_divisor: str, expected: float) -> None:
    result = merged(
        methods.ties,
        [3],
        [-2],
        density=1.0,
        weights=(1, -1),
        election="weighted",
        divisor="weights",
        zero_divisor=zero_divisor,
    )
    assert result == [expected]


@pytest.mark.parametrize(
    ("tie", "expected"),
    [("plus", [1, 5, 7]), ("minus", [-1, 5, 7]), ("zero", [0, 5, 7]), ("majority", [1, 5, 7])],
)
def test_ties_zero_sum(tie: str, expected: list[float]) -> None:
    result = merged(methods.ties, [1, 4, 7], [-1, 6, 7], density=1.0, tie=tie)
    assert result == expected


def test_ties_majority_follows_the_model_and_is_negative_without_one() -> None:
    assert merged(methods.ties, [1, -4, -7, 2], [-1, -6, -7, 2], density=1.0) == [-1, -5, -7, 2]
    assert merged(methods.ties, [1, -4, 2], [-1, -6, 2], density=1.0) == [-1, -5, 2]


def test_ties_majority_counts_over_all_tensors() -> None:
    tau = {
        "a": [np.array([1.0]), np.array([-1.0])],
        "b": [np.array([-3.0, -3.0]), np.array([-3.0, -5.0])],
    }
    result = methods.ties(tau, density=1.0)
    assert {name: array.tolist() for name, array in result.items()} == {"a": [-1], "b": [-3, -4]}


def test_ties_sign_by_count_or_by_mass() -> None:
    vectors = ([5.0], [-2.0], [-1.0])
    assert merged(methods.ties, *vectors, density=1.0, sign="mass") == [5]
    assert merged(methods.ties, *vectors, density=1.0, sign="count") == [-1.5]


@pytest.mark.parametrize(
    ("count", "density", "expected"),
    [
        ("exact", 0.5, [3, 0, 2, 0]),  # of two equal magnitudes the earlier is kept
        ("official", 0.5, [3, 0, 2, -2]),  # the threshold is 2, and both reach it
        ("official", 0.25, [3, 0, 2, -2]),
        ("official", 0.0, [3, 0, 0, 0]),
        ("official", 1.0, [3, 1, 2, -2]),
        ("exact", 0.2, [0, 0, 0, 0]),
        ("at_least_one", 0.2, [3, 0, 0, 0]),
        ("exact", 1.0, [3, 1, 2, -2]),
    ],
)
def test_ties_count(count: str, density: float, expected: list[float]) -> None:
    result = merged(methods.ties, [3, 1, 2, -2], density=density, count=count, scope="tensor")
    assert result == expected


@pytest.mark.parametrize(
    ("scope", "a", "b"),
    [
        ("row", [[0, 2], [0, 4]], [0, 6]),
        ("tensor", [[0, 0], [3, 4]], [0, 6]),
        ("model", [[0, 0], [0, 4]], [5, 6]),
    ],
)
def test_ties_scope(scope: str, a: list[list[float]], b: list[float]) -> None:
    tau = {"b": [np.array([5.0, 6.0])], "a": [np.array([[1.0, 2.0], [3.0, 4.0]])]}
    result = methods.ties(tau, density=0.5, count="exact", scope=scope)  # type: ignore[arg-type]
    assert result["a"].tolist() == a
    assert result["b"].tolist() == b


def test_ties_keeps_the_earlier_tensor_by_the_bytes_of_its_name() -> None:
    tau = {"a": [np.array([2.0])], "B": [np.array([2.0])]}
    result = methods.ties(tau, density=0.5, count="exact", scope="model")
    assert (result["B"].tolist(), result["a"].tolist()) == ([2], [0])


def test_ties_density_per_model() -> None:
    result = merged(methods.ties, [1, 2], [4, 3], density=(0.5, 1.0), count="exact", scope="tensor")
    assert result == [4, 2.5]


# Breadcrumbs

ROWS = [[1, 2, 3, 4], [10, 20, 30, 40]]


def test_breadcrumbs_by_row() -> None:
    result = merged(methods.breadcrumbs, ROWS, density=0.5, gamma=0.25)
    assert result == [[0, 2, 3, 0], [0, 20, 30, 0]]


def test_breadcrumbs_flattened() -> None:
    expected = [[0, 0, 3, 4], [10, 20, 0, 0]]
    assert merged(methods.breadcrumbs_mergekit, ROWS, density=0.5, gamma=0.25) == expected


@pytest.mark.parametrize(
    ("conflict", "expected"), [("remove", [1, 2, 0, 0]), ("keep", [1, 2, 3, 0])]
)
def test_breadcrumbs_density_against_gamma(conflict: str, expected: list[float]) -> None:
    result = merged(methods.breadcrumbs, [1, 2, 3, 4], density=0.75, gamma=0.5, conflict=conflict)
    assert result == expected


@pytest.mark.parametrize(
    ("density", "gamma", "at_least_one", "expected"),
    [
        (0.2, 0.25, False, [0, 0, 0, 0]),
        (0.2, 0.25, True, [0, 0, 3, 0]),
        (0.5, 1.0, False, [0, 0, 0, 0]),
        (0.5, 1.0, True, [1, 0, 0, 0]),
    ],
)
def test_breadcrumbs_row_that_would_be_empty(
    density: float, gamma: float, at_least_one: bool, expected: list[float]
) -> None:
    result = merged(
        methods.breadcrumbs, [1, 2, 3, 4], density=density, gamma=gamma, at_least_one=at_least_one
    )
    assert result == expected


def test_breadcrumbs_scalars_are_left_alone_by_row_only() -> None:
    settings: dict[str, Any] = {"density": 0.5, "gamma": 0.25}
    assert merged(methods.breadcrumbs, 7.0, **settings) == 7.0
    assert merged(methods.breadcrumbs_mergekit, 7.0, **settings) == 0.0


def test_breadcrumbs_weights_and_signs() -> None:
    result = merged(
        methods.breadcrumbs,
        [1, -2, 3, -4],
        [8, 6, -4, 2],
        density=0.5,
        gamma=0.25,
        weights=(1.0, 0.5),
    )
    assert result == [0, -2 + 3, 3 - 2, 0]


def test_breadcrumbs_ties_elects_among_what_is_left() -> None:
    vectors = ([1, -2, 3, -4], [8, 6, -4, 2])
    settings: dict[str, Any] = {"density": 0.5, "gamma": 0.25, "weights": (1.0, 0.5)}
    assert merged(methods.breadcrumbs_ties, *vectors, **settings) == [0, 3, 3, 0]
    # Each kept entry has one agreeing model here, so dividing by its weight restores its value.
    divided = merged(methods.breadcrumbs_ties, *vectors, **settings, divisor="weights")
    assert divided == [0, 6, 3, 0]
