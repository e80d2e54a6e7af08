"""SLERP and its kin, Model Stock and selective methods, worked out by hand."""

from __future__ import annotations

from itertools import permutations
from math import cos, pi, sin, sqrt
from typing import Any

import numpy as np
import pytest

from mergebench import apply, merge_models, ops
from mergebench.core.errors import MergebenchError, ParameterError

from .support import assert_exactly, merged

A, B = [1.0, 0.0], [0.0, 2.0]
ROOT = sqrt(0.5)


def assert_about(got: Any, expected: Any) -> None:
    """Equal to within a few roundings of float32."""
    assert np.allclose(got, expected, rtol=4e-7, atol=1e-7), (got, expected)


def soup(method: str, *models: Any, weights: Any = (), base: Any = None, **params: Any) -> Any:
    """The merged weights ``w`` of some models, without a base unless one is given."""
    tables = [{"w": np.array(model, np.float32)} for model in models]
    pairs = list(zip(tables, weights or (1.0,) * len(tables), strict=True))
    under = None if base is None else {"w": np.array(base, np.float32)}
    return merge_models(pairs, base=under, method=method, **params)["w"].tolist()


def test_slerp_and_karcher_differ_where_lengths_do() -> None:
    """A = [1, 0] and b = [0, 2]: SLERP weighs the lengths, Karcher takes their mean."""
    assert_about(soup("slerp", A, B), [ROOT, 2 * ROOT])
    assert_about(soup("nuslerp", A, B), [ROOT, 2 * ROOT])
    assert_about(soup("karcher", A, B), [1.5 * ROOT, 1.5 * ROOT])
    assert_about(soup("multislerp", A, B), [1.5 * ROOT, 1.5 * ROOT])


def test_equal_lengths_agree() -> None:
    """Of two vectors of one length SLERP, Karcher and multi-SLERP are the same."""
    other = [0.6, 0.8]
    half = [1 / sqrt(0.8) * x / 2 for x in (1.6, 0.8)]
    for method in ("slerp", "karcher", "multislerp"):
        assert_about(soup(method, A, other), half)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_slerp_of_a_right_angle(share: float) -> None:
    """(1 - t) and t of a right angle: cos and sin of t · 90°; the ends are the models."""
    expected = [cos(share * pi / 2), 2 * sin(share * pi / 2)]
    assert_about(soup("slerp", A, B, weights=(1 - share, share)), expected)
    assert_about(soup("slerp", B, A, weights=(share, 1 - share)), expected)


def test_slerp_is_measured_on_whole_tensors_or_rows() -> None:
    """Rows [1, 0], [0, 2] and [0, 2], [0, 2]: the second is the same in both models."""
    one, two = [[1.0, 0.0], [0.0, 2.0]], [[0.0, 2.0], [0.0, 2.0]]
    assert_about(soup("slerp", one, two, scope="row"), [[ROOT, 2 * ROOT], [0, 2]])
    omega = np.arccos(4 / sqrt(5 * 8))
    share = sin(omega / 2) / sin(omega)
    assert_about(soup("slerp", one, two), [[share, 2 * share], [0, 4 * share]])


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (([1, 2], [-1, -2]), [-0.5, -1]),  # opposite
        (([1, 2], [2, 4]), [1.75, 3.5]),  # parallel
        (([1, 2], [1, 2]), [1, 2]),  # equal
        (([0, 0], [1, 2]), [0.75, 1.5]),  # one is zero
        (([0, 0], [0, 0]), [0, 0]),
        (([3.0], [-5.0]), [-3.0]),  # one entry has no angle between
        ((7.0, 5.0), 5.5),
    ],
)
def test_slerp_without_an_arc_is_linear(models: Any, expected: Any) -> None:
    """Parallel, opposite, zero and one-entry tensors: (1 - t) a + t b with t = 3/4."""
    for method in ("slerp", "nuslerp"):
        assert_exactly(soup(method, *models, weights=(0.25, 0.75)), expected)


def test_the_threshold_of_slerp_is_a_parameter() -> None:
    """Cos = .8 is an arc below a threshold of .9 and a line above one of .7."""
    omega = np.arccos(0.8)
    share = sin(omega / 2) / sin(omega)
    assert_about(soup("slerp", A, [0.8, 0.6], threshold=0.9), [1.8 * share, 0.6 * share])
    assert_about(soup("slerp", A, [0.8, 0.6], threshold=0.7), [0.9, 0.3])


def test_slerp_takes_two_models_with_a_sum_of_weights() -> None:
    """Three models and weights that cancel are refused before anything is read."""
    with pytest.raises(ParameterError, match="number of models, expected 1 to 2, got 3"):
        soup("slerp", A, B, A)
    with pytest.raises(ParameterError, match="slerp: number of models, expected at most 2, got 3"):
        apply(ops["slerp"](), [np.array(A)] * 3)
    for method in ("slerp", "nuslerp", "multislerp", "karcher", "model_stock"):
        with pytest.raises(ParameterError, match="weights"):
            soup(method, A, B, weights=(1.0, -1.0), base=[0.0, 0.0])


def test_nuslerp_moves_task_vectors_where_there_is_a_base() -> None:
    """Base [1, 1]: τ = [0, -1] and [-1, 1], so cos = -1/√2 and an angle of 135°."""
    share = sin(3 * pi / 8) / sin(3 * pi / 4)
    got = soup("nuslerp", A, B, base=[1.0, 1.0])
    assert_about(got, [1 - share, 1 - share + share])


def test_multislerp_by_projection_stays_short() -> None:
    """Unit vectors at 0° and 90° with weights 3 and 1: m = [3, 1]/√10."""
    m = np.array([3, 1]) / sqrt(10)
    units, shares = np.eye(2), (0.75, 0.25)
    for tangent in ("log", "projection"):
        step = np.zeros(2)
        for u, share in zip(units, shares, strict=True):
            flat = u - (u @ m) * m
            angle = np.arccos(u @ m)
            step += share * flat * (angle / sin(angle) if tangent == "log" else 1)
        size = np.linalg.norm(step)
        expected = cos(size) * m + sin(size) * step / size
        got = soup("multislerp", [1, 0], [0, 1], weights=(3.0, 1.0), tangent=tangent)
        assert_about(got, expected)


def test_karcher_reaches_the_mean_angle() -> None:
    """On a circle the mean direction has the mean angle: 0°, 40° and 80° give 40°."""
    units = [[cos(angle), sin(angle)] for angle in np.deg2rad([0, 40, 80])]
    assert_about(soup("karcher", *units), units[1])
    angle = np.deg2rad((1 * 0 + 2 * 40 + 5 * 80) / 8)
    got = soup("karcher", *units, weights=(1.0, 2.0, 5.0), max_iter=50, tol=1e-9)
    assert_about(got, [cos(angle), sin(angle)])


@pytest.mark.parametrize("method", ["karcher", "multislerp"])
@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (([1, 2], [-1, -2]), [0, 0]),  # no mean direction: the arithmetic mean
        (([3.0], [-5.0]), [-1.0]),
        (([0, 0], [3, 4]), [1.5, 2]),  # a zero tensor only shortens
        (([0, 0], [0, 0]), [0, 0]),
        (([1, 2], [1, 2], [1, 2]), [1, 2]),
        (([1, 2], [3, 6]), [2, 4]),
        (([5, -3],), [5, -3]),
    ],
)
def test_means_on_the_sphere_of_degenerate_tensors(method: str, models: Any, expected: Any) -> None:
    """Opposite, zero, equal and single tensors."""
    assert_about(soup(method, *models), expected)


def test_karcher_refuses_negative_weights() -> None:
    """A direction cannot be far from a model."""
    with pytest.raises(ParameterError, match="none below zero"):
        soup("karcher", A, B, weights=(2.0, -1.0))


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        (([2, 0], [1, sqrt(3)]), [1.0, sqrt(3) / 3]),  # cos = .5, t = 2/3
        (([1, 0, 0], [0.5, sqrt(3) / 2, 0], [0.5, sqrt(3) / 6, sqrt(6) / 3]), None),  # t = .75
        ((A, B), [0, 0]),  # cos = 0: the base
        (([1, 2], [-1, -2]), [0, 0]),  # the denominator vanishes: the base
        (([1, 2], [1, 2]), [1, 2]),
        (([0, 0], [1, 2]), [0, 0]),
        (([4, 2],), [4, 2]),
        ((3.0, 5.0), 4.0),
    ],
)
def test_model_stock(vectors: Any, expected: Any) -> None:
    """T = N c / (1 + (N - 1) c) of the way to the mean."""
    if expected is None:
        expected = 0.75 * np.mean(vectors, axis=0)
    assert_about(merged("model_stock", *vectors), expected)


def test_model_stock_leads_beyond_the_base_unless_clamped() -> None:
    """Cos = -.2 and N = 2 give t = -.5."""
    vectors = ([1.0, 0.0], [-0.2, sqrt(0.96)])
    mean = np.mean(vectors, axis=0)
    assert_about(merged("model_stock", *vectors), -0.5 * mean)
    assert_exactly(merged("model_stock", *vectors, clamp=True), [0, 0])


def test_model_stock_by_row() -> None:
    """Rows with cosines of 1 and 0: the first moves to the mean, the second stays."""
    got = merged("model_stock", [[1, 2], [1, 0]], [[3, 6], [0, 1]], scope="row")
    assert_about(got, [[2, 4], [0, 0]])


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_the_angles_of_model_stock_have_no_order(scope: str) -> None:
    """Cosines of 1/2, -1/2 and multiples of 1/√6 that cancel do so in any order of models."""
    vectors = [[-1, 0, -1], [1, 0, -1], [-1, 1, 0], [1, -1, -1]]
    found = set()
    for order in permutations(range(len(vectors))):
        models = [np.array([vectors[place]], np.float32) for place in order]
        got = apply(ops["stock_ratio"](scope=scope), models)
        found.add((got[order.index(0)] + 0.0).tobytes())
    assert len(found) == 1


def test_shares_of_both_signs_that_cancel_leave_nothing() -> None:
    """1/3 + 2/3 - 1 of equal energies, in whatever order float32 rounds it."""
    models = [np.array([2.0, 1]), np.array([1.0, 2]), np.array([2.0, -1])]
    weights = (0.1, 0.2, -0.3)
    for order in permutations(range(3)):
        chosen = [models[place].astype(np.float32) for place in order]
        got = apply(ops["energy_mean"](), chosen, weights=[weights[place] for place in order])
        # Of the second entry two models agree: (1/3 · 1 + 2/3 · 2) / 1.
        assert_about(got.tolist(), [0, 5 / 3])


def test_sce_by_hand() -> None:
    """Variances [1, 0, 16, 4]: half keeps the last two; η = 26 and 34; signs + and -."""
    one, two = [1, 2, 5, -1], [3, 2, -3, -5]
    assert_about(merged("sce", one, two, select_topk=0.5), [0, 0, 5, -(26 + 5 * 34) / 60])
    # All four: η = 31 and 47; 1 and 3 agree, so do 2 and 2, -3 yields to 5.
    got = merged("sce", one, two)
    assert_about(got, [(31 + 3 * 47) / 78, 2, 5, -(31 + 5 * 47) / 78])


@pytest.mark.parametrize(("tie", "expected"), [("zero", 0), ("plus", 2), ("minus", -2)])
def test_sce_of_sums_that_cancel(tie: str, expected: float) -> None:
    """2 and -2 sum to zero."""
    assert_exactly(merged("sce", [2.0], [-2.0], tie=tie), [expected])


@pytest.mark.parametrize(
    ("count", "expected"), [("exact", [2, 2, 0, 0]), ("nonzero", [2, 0, 0, 0])]
)
def test_sce_counts_entries(count: str, expected: list[float]) -> None:
    """Of equal variances the earlier; half of four entries, or of the two that vary."""
    got = merged("sce", [2, 2, 1, 1], [2, 2, 1, 1], select_topk=0.5, count=count)
    assert_exactly(got, [2, 2, 0, 0] if count == "exact" else [0, 0, 0, 0])
    got = merged("sce", [2, 2, 1, 1], [0, 0, 1, 1], select_topk=0.5, count=count)
    assert_exactly(got, expected)


def test_ram_keeps_what_is_unique() -> None:
    """The first entry overlaps, the second is one model's, the third nobody's."""
    assert_exactly(merged("ram", [2, 4, 0], [6, 0, 0]), [4, 4, 0])
    assert_exactly(merged("ram", [2, 4, 1e-6], [6, 1e-5, 0]), [4, 4, 0])
    assert_exactly(merged("ram", [2, 4], [6, 2], epsilon=3.0), [6, 4])


def test_ram_plus_scales_what_is_unique() -> None:
    """Model 1 shares one change of two, model 2 all: ρ = 1, and 1 + .5 · min(1, α)."""
    vectors = ([2, 4, 0], [6, 0, 0])
    assert_exactly(merged("ramplus_tl", *vectors, r=0.5, alpha=0.25), [4, 4.5, 0])
    assert_exactly(merged("ramplus_tl", *vectors, r=0.5, alpha=9.0), [4, 6, 0])
    assert_exactly(merged("ramplus_tl", [2.0, 3.0], r=0.5, alpha=9.0), [2, 3])


def test_ram_plus_counts_over_tensors_or_the_model() -> None:
    """Tensor a overlaps, tensor b is unique: only the model as a whole has a ratio."""
    one = {"a": np.array([2.0], np.float32), "b": np.array([4.0], np.float32)}
    two = {"a": np.array([6.0], np.float32), "b": np.array([0.0], np.float32)}
    base = {name: np.zeros_like(array) for name, array in one.items()}
    for scope, expected in (("tensor", 4.0), ("model", 6.0)):
        share: dict[str, Any] = {"r": 0.5, "alpha": 9.0, "scope": scope}
        got = merge_models([one, two], base=base, method="ramplus_tl", **share)
        assert_exactly((got["a"].tolist(), got["b"].tolist()), ([4.0], [expected]))


def test_nearswap_moves_by_at_most_t() -> None:
    """Differences of 0, .25 and -2 with t = .5."""
    assert_exactly(soup("nearswap", [1, 1.25, -1], base=[1, 1, 1], t=0.5), [1, 1.25, 0.5])


def test_arcee_fusion_takes_the_outliers() -> None:
    """In one row importance is |τ| times a constant: Q1 = 1, median 2, Q3 = 2, limit 3.5."""
    assert_exactly(soup("arcee_fusion", [1, 2, 2, 4], base=[0, 0, 0, 0]), [0, 0, 0, 4])
    assert_exactly(soup("arcee_fusion", [1, 2, 2, 4], base=[0] * 4, iqr=0.0), [0, 2, 2, 4])
    assert_exactly(soup("arcee_fusion", [3.0], base=[1.0]), [3.0])
    assert_exactly(soup("arcee_fusion", [2, 2], base=[2, 2]), [2, 2])


@pytest.mark.parametrize("method", ["arcee_fusion", "nearswap", "model_stock", "sce", "ram"])
def test_a_missing_base_is_said(method: str) -> None:
    """Methods of task vectors name the option that a full checkpoint needs."""
    with pytest.raises(MergebenchError, match="--base"):
        soup(method, A)


def test_arcee_fusion_looks_at_the_base_in_memory_too() -> None:
    """`apply` takes the base beside the task vectors, and says so where it is missing."""
    op, tau = ops["keep_important"](), [np.array([1.0, 2.0, 2.0, 4.0])]
    assert_exactly(apply(op, tau, base=np.zeros(4))[0].tolist(), [0, 0, 0, 4])
    with pytest.raises(MergebenchError, match="none is given"):
        apply(op, tau)
    with pytest.raises(MergebenchError, match="another shape"):
        apply(op, tau, base=np.zeros(3))


def test_passthrough_and_differences() -> None:
    """Half of one model; A + .5 (B - C)."""
    assert_exactly(soup("passthrough", [2, -4], scale=0.5), [1, -2])
    got = soup("add_difference", [1, 2], [5, 8], weights=(1.0, 0.5), base=[1, 4])
    assert_exactly(got, [1 + 0.5 * 4, 2 + 0.5 * 4])
    with pytest.raises(ParameterError, match="number of models"):
        soup("passthrough", A, B)


def test_products_beyond_float64_are_refused() -> None:
    """Entries of 1e200 have no finite inner product, and no silent result."""
    models = [{"w": np.array([1e200, x])} for x in (0.0, 1e200)]
    with pytest.raises(MergebenchError, match="w: inner products exceed float64"):
        merge_models(models, method="slerp")
