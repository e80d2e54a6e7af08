"""Geometric and selective methods against their equations on whole vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mergebench import merge_models
from tests.oracle import geometric as oracle
from tests.oracle import methods
from tests.oracle.test_against_oracle import CASES, Case, assert_rounds_to, cases

SCOPES: Mapping[str, Any] = {"tensor": oracle.each_tensor, "row": oracle.each_row}


def limited(case: Case, most: int = 4, *, positive: bool = False) -> Case:
    """The first models of a case, with weights that have a sum."""
    weights = case.weights[:most]
    assume(abs(sum(weights)) > 1e-9)
    assume(not positive or min(weights) >= 0)
    return Case(case.base, case.models[:most], weights, case.density, case.lam)


def assert_near(got: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray]) -> None:
    """Within eight roundings of float32, relative to the largest entry of the tensor."""
    assert set(got) == set(exact)
    for name, wanted in exact.items():
        assert got[name].dtype == np.float32
        bound = 8 * np.finfo(np.float32).eps * max(np.abs(wanted).max(initial=0.0), 1.0)
        error = np.abs(got[name].astype(np.float64) - wanted).max(initial=0.0)
        assert error <= bound, (name, error, bound)


@pytest.mark.parametrize("levels", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
@given(data=st.data())
@CASES
def test_slerp(scope: str, levels: bool, data: st.DataObject) -> None:
    """SLERP of weights, and NuSLERP of weights and of task vectors, by tensor and by row."""
    case = limited(data.draw(cases(levels=levels, signed=False)), 2)
    threshold = data.draw(st.sampled_from([0.9995, 0.9, 0.0]))
    share = {"threshold": threshold, "scope": scope}

    def merge(vectors: list[np.ndarray]) -> np.ndarray:
        return oracle.slerp(vectors, case.weights, threshold)

    weights = SCOPES[scope](case.per_model, merge)
    assert_near(case.merged("slerp", **share), weights)
    pairs = list(zip(case.models, case.weights, strict=True))
    assert_near(merge_models(pairs, method="nuslerp", **share), weights)
    delta = SCOPES[scope](case.task_vectors, merge)
    expected = methods.apply_to_base(case.base, delta)
    assert_near(case.merged("nuslerp", **share), expected)


@pytest.mark.parametrize("tangent", ["log", "projection"])
@pytest.mark.parametrize("normalize", [True, False])
@given(data=st.data())
@CASES
def test_multislerp(tangent: str, normalize: bool, data: st.DataObject) -> None:
    """One step on the sphere, of weights and of task vectors."""
    case = limited(data.draw(cases(levels=data.draw(st.booleans()), signed=False)))
    share: dict[str, Any] = {"tangent": tangent, "normalize": normalize}

    def merge(vectors: list[np.ndarray]) -> np.ndarray:
        log = tangent == "log"
        return oracle.sphere_mean(
            vectors, case.weights, steps=1, tol=0.0, log=log, normalize=normalize
        )

    pairs = list(zip(case.models, case.weights, strict=True))
    weights = oracle.each_tensor(case.per_model, merge)
    assert_near(merge_models(pairs, method="multislerp", **share), weights)
    delta = oracle.each_tensor(case.task_vectors, merge)
    expected = methods.apply_to_base(case.base, delta)
    assert_near(case.merged("multislerp", **share), expected)


@pytest.mark.parametrize(("steps", "tol"), [(10, 1e-5), (1, 0.0), (3, 1e-3), (100, 1e-9)])
@given(data=st.data())
@CASES
def test_karcher(steps: int, tol: float, data: st.DataObject) -> None:
    """The mean on the sphere of models in general position, after some steps or to the end."""
    case = limited(data.draw(cases(levels=False, signed=False)))

    def merge(vectors: list[np.ndarray]) -> np.ndarray:
        return oracle.sphere_mean(vectors, case.weights, steps=steps, tol=tol)

    expected = oracle.each_tensor(case.per_model, merge)
    got = case.merged("karcher", max_iter=steps, tol=tol)
    assert_near(got, expected)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
@given(data=st.data())
@CASES
def test_model_stock(scope: str, clamp: bool, data: st.DataObject) -> None:
    """The step towards the mean, by tensor and by row."""
    case = limited(data.draw(cases(levels=data.draw(st.booleans()), signed=False)))

    def merge(vectors: list[np.ndarray]) -> np.ndarray:
        return oracle.stock(vectors, case.weights, clamp=clamp)

    delta = SCOPES[scope](case.task_vectors, merge)
    expected = methods.apply_to_base(case.base, delta)
    assert_near(case.merged("model_stock", scope=scope, clamp=clamp), expected)


@pytest.mark.parametrize("count", ["exact", "nonzero"])
@pytest.mark.parametrize("tie", ["zero", "plus", "minus"])
@given(data=st.data())
@CASES
def test_sce(count: Any, tie: Any, data: st.DataObject) -> None:
    """Selection with many equal variances, energies, and sums that cancel."""
    case = limited(data.draw(cases(levels=True, signed=False)))

    def merge(vectors: list[np.ndarray]) -> np.ndarray:
        mask = oracle.most_varied(vectors, case.density, count)
        return oracle.sce(vectors, case.weights, mask, tie=tie)

    delta = oracle.each_tensor(case.task_vectors, merge)
    expected = methods.apply_to_base(case.base, delta, case.lam)
    got = case.merged("sce", select_topk=case.density, count=count, tie=tie, lam=case.lam)
    assert_rounds_to(got, expected)


@given(data=st.data())
@CASES
def test_ram_and_its_plus(data: st.DataObject) -> None:
    """Unique and overlapping changes, with entries at the limit itself."""
    case = data.draw(cases())
    epsilon = data.draw(st.sampled_from([0.0, 1e-5, 0.25, 0.5]))
    r, alpha = (data.draw(st.sampled_from([0.0, 0.1, 0.5, 2.0])) for _ in range(2))
    for method, given_ in (("ram", {}), ("ramplus_tl", {"r": r, "alpha": alpha})):

        def merge(vectors: list[np.ndarray], given_: Mapping[str, float] = given_) -> np.ndarray:
            return oracle.ram(vectors, case.weights, epsilon=epsilon, **given_)

        delta = oracle.each_tensor(case.task_vectors, merge)
        expected = methods.apply_to_base(case.base, delta, case.lam)
        assert_rounds_to(case.merged(method, epsilon=epsilon, lam=case.lam, **given_), expected)


@given(data=st.data())
@CASES
def test_methods_of_one_model(data: st.DataObject) -> None:
    """NearSwap, Arcee Fusion and passthrough."""
    case = data.draw(cases(levels=False, most=1))
    (model,), base = case.models, case.base
    tau = {name: each[0] for name, each in case.task_vectors.items()}
    t = data.draw(st.sampled_from([0.0, 0.1, 0.5, 3.0]))
    moved = {name: oracle.near(each.ravel(), t).reshape(each.shape) for name, each in tau.items()}
    got = merge_models([model], base=base, method="nearswap", t=t)
    assert_rounds_to(got, methods.apply_to_base(base, moved))
    iqr = data.draw(st.sampled_from([0.0, 0.5, 1.5]))
    kept = oracle.fusion(base, tau, iqr)
    got = merge_models([model], base=base, method="arcee_fusion", iqr=iqr)
    assert_rounds_to(got, methods.apply_to_base(base, kept))
    scaled = {name: -1.5 * np.asarray(array, np.float64) for name, array in model.items()}
    assert_rounds_to(merge_models([model], method="passthrough", scale=-1.5), scaled)


@given(case=cases())
@CASES
def test_adding_a_difference(case: Case) -> None:
    """A + m (B - C) for every m, computed on C."""
    first, *others = case.models
    other, share = (others or [first])[0], case.weights[0]
    wide = {name: np.asarray(array, np.float64) for name, array in first.items()}
    expected = {name: wide[name] + share * (other[name] - case.base[name]) for name in wide}
    got = merge_models([first, (other, share)], base=case.base, method="add_difference")
    assert_rounds_to(got, expected)
