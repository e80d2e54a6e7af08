"""Chains on arrays of another library, and data that cannot be merged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergebench.core.errors import MergebenchError
from mergebench.merge.chains import tolerance_of
from mergebench.merge.method import METHODS

from .array_promises import assert_gradients, assert_homogeneous, assert_torch_agrees
from .assertions import assert_same_values
from .exemptions import NEUTRAL_OF, neutral
from .promises import assert_refuses_nonfinite
from .support import (
    BF16,
    F16,
    F32,
    F64,
    FEW,
    GENERIC,
    KINDS,
    SOME,
    apply,
    cases,
    drawn,
    every_method,
    merge_models,
    taken,
)


@every_method("torch")
@given(data=st.data())
@SOME
def test_torch_tensors_give_the_same(method: str, data: st.DataObject) -> None:
    """On torch tensors a chain gives numpy's values within one ulp, zeros in the same places.

    Where LAPACK is behind it, within the tolerance it declares, for singular values that differ.
    """
    params = drawn(data, method)
    kinds = ("normal",) if tolerance_of(METHODS[method](**params)) else KINDS
    assert_torch_agrees(method, data.draw(cases(kinds=kinds, limits=taken(method))), params)


@every_method("gradients")
@given(data=st.data())
@GENERIC
def test_gradients_are_those_of_finite_differences(method: str, data: st.DataObject) -> None:
    """Gradients pass through torch tensors, and are the slope that finite differences measure."""
    case = data.draw(cases(F64, kinds=("normal",), limits=taken(method)))
    assert_gradients(method, case, drawn(data, method), data.draw(st.integers(0, 99)))


@every_method("non-finite")
@given(data=st.data())
@SOME
def test_nan_and_infinity_in_a_model_are_refused(method: str, data: st.DataObject) -> None:
    """NaN and infinity in a model are an error with the model, the tensor and their number."""
    dtype = data.draw(st.sampled_from([F32, BF16, F16, F64]))
    case = data.draw(cases(dtype, limits=taken(method)))
    guilty = data.draw(st.integers(0, len(case.models) - 1))
    assert_refuses_nonfinite(method, case, drawn(data, method), f"models[{guilty}]")


@every_method("non-finite")
@given(data=st.data())
@FEW
def test_nan_and_infinity_in_the_base_are_refused(method: str, data: st.DataObject) -> None:
    """So they are in a base that takes part; methods of weight space read none."""
    if METHODS[method].space != "weight":
        assert_refuses_nonfinite(
            method, data.draw(cases(limits=taken(method))), drawn(data, method), "the base"
        )
    else:
        case = data.draw(cases(limits=taken(method)))
        case.base["model.scale"] = np.array(np.nan, F32)
        models = list(zip(case.models, case.weights, strict=True))
        params = drawn(data, method)
        without = merge_models(models, method=method, **params)
        assert_same_values(merge_models(models, base=case.base, method=method, **params), without)


@every_method("non-finite")
@given(data=st.data())
@FEW
def test_infinity_in_both_is_refused(method: str, data: st.DataObject) -> None:
    """Infinity in model and base alike, whose difference is no number, is an error too."""
    case = data.draw(cases(most=2, limits=taken(method)))
    case.base["model.scale"] = np.array(np.inf, F32)
    for model in case.models:
        model["model.scale"] = np.array(np.inf, F32)
    models = list(zip(case.models, case.weights, strict=True))
    with pytest.raises(MergebenchError, match=r"tensor 'model\.scale' has 0 NaN and 1 infinite"):
        merge_models(models, base=case.base, method=method, **drawn(data, method))


@every_method("non-finite")
@pytest.mark.parametrize("size", [1e20, 3e38])
def test_large_numbers_are_merged_or_refused(method: str, size: float) -> None:
    """Numbers whose squares overflow are merged without a warning; no infinity comes out."""
    base = {"w": np.zeros(3, F32)}
    model = {"w": np.array([size, -size, 0], F32)}
    params = {k: v for k, v in neutral(method).items() if k in METHODS[method].params}
    out = merge_models([model], base=base, method=method, **params)
    assert np.isfinite(out["w"]).all()
    assert np.any(out["w"] != 0)


@every_method("non-finite")
@given(data=st.data())
@FEW
def test_results_out_of_range_are_refused(method: str, data: st.DataObject) -> None:
    """Sums beyond float32 are an error, in float32 as in bfloat16; no infinity comes out."""
    case = data.draw(
        cases(data.draw(st.sampled_from([F32, BF16])), kinds=("exact",), limits=taken(method))
    )
    huge = case.mapped(lambda array: (array * array.dtype.type(2.0**126)).astype(array.dtype))
    try:
        out = merge_models(
            list(zip(huge.models, case.weights, strict=True)),
            base=huge.base,
            method=method,
            **drawn(data, method),
        )
    except MergebenchError as error:
        assert "do not fit" in error.what or "exceeds" in error.what  # noqa: PT017
        return
    assert all(np.isfinite(array.astype(F64)).all() for array in out.values())


@every_method("homogeneous")
@given(data=st.data())
@FEW
def test_large_and_small_scales_are_alike(method: str, data: st.DataObject) -> None:
    """Even far from 1, near float32's ends, scaling passes through."""
    power = data.draw(st.sampled_from([-60, 60]))
    assert_homogeneous(
        method, data.draw(cases(kinds=("exact",), limits=taken(method))), drawn(data, method), power
    )


@every_method("in memory")
def test_names_and_shapes_must_agree(method: str) -> None:
    """`apply` refuses task vectors with other names, other shapes, or no task vector at all."""
    chain = METHODS[method]()
    with pytest.raises(MergebenchError, match=r"model 1: tensor 'b' is not in every model"):
        apply(chain, [{"a": np.zeros(2, F32)}, {"a": np.zeros(2, F32), "b": np.zeros(1, F32)}])
    with pytest.raises(MergebenchError, match=r"a: model 1 has another shape"):
        apply(chain, [{"a": np.zeros(2, F32)}, {"a": np.zeros(3, F32)}])
    with pytest.raises(MergebenchError, match=r"one weight per model"):
        apply(chain, [np.zeros(2, F32)], [1.0, 2.0])
    with pytest.raises(MergebenchError):
        apply(chain, [])


@every_method("in memory")
def test_empty_arrays_stay_empty(method: str) -> None:
    """Tensors without entries come out without entries."""
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 3)):
        empty = np.zeros(shape, F32)
        models = [empty] * min(2, taken(method).most or 2)
        found = apply(METHODS[method](), models, base=empty)
        assert {each.shape for each in (found if isinstance(found, list) else [found])} == {shape}


@every_method("in memory")
@pytest.mark.parametrize("array", [np.array([1, -2, 3]), np.array([True, False])], ids=str)
def test_integers_are_no_task_vectors(method: str, array: np.ndarray) -> None:
    """`apply` refuses integer and boolean arrays, on which weights would be cut to integers."""
    with pytest.raises(MergebenchError):
        apply(METHODS[method](), [array, array], [0.5, 0.25])


@every_method("in memory")
@given(data=st.data())
@FEW
def test_half_precision_keeps_what_single_keeps(method: str, data: st.DataObject) -> None:
    """A single task vector of 16 bits keeps the entries that it keeps in float32, or is refused."""
    dtype = data.draw(st.sampled_from([BF16, F16]))
    case = data.draw(cases(dtype, most=1, limits=taken(method)))
    # What is multiplied would be rounded to 16 bits.
    plain = {"lam": 1.0, "scale": 1.0, "rescale": "none", "beta": 0.0}
    chain = METHODS[method](**drawn(data, method, **{**plain, **NEUTRAL_OF.get(method, {})}))
    wide = [{n: t.astype(F32) for n, t in case.task_vectors[0].items()}]
    base = {n: t.astype(F32) for n, t in case.base.items()}
    expected = apply(chain, wide, base=base)
    try:
        got = apply(chain, case.task_vectors, base=case.base)
    except MergebenchError:
        return
    assert_same_values({n: t.astype(F32) for n, t in got.items()}, expected)
