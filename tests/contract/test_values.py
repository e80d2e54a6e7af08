"""What a merge is, whatever the method: identity, base, homogeneity, and the arrays it gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergebench.core.errors import MergebenchError
from mergebench.merge.chains import tolerance_of
from mergebench.merge.method import METHODS

from .array_promises import assert_homogeneous
from .assertions import assert_close
from .exemptions import neutral
from .promises import (
    assert_apply_is_merge,
    assert_base_at_zero,
    assert_buffers_kept,
    assert_identity,
    assert_identity_within,
    assert_rounded_once,
    assert_sweep_is_single,
)
from .support import (
    BF16,
    F8,
    F8_WIDE,
    F16,
    F32,
    F64,
    FEW,
    SOME,
    accepted,
    apply,
    cases,
    drawn,
    drawn_by_label,
    every_method,
    merge_models,
    merged,
    taken,
    values_of,
)

EXACT = ("exact", "ternary")
BUFFERS = {
    "steps": np.array(7),
    "mask": np.array([True, False]),
    "shifts": np.array([[3, -4]], np.int8),
    "counts": np.array([2**31 - 1], np.int32),
    "bytes": np.array([255, 0], np.uint8),
}


@every_method("identity")
@given(data=st.data())
@SOME
def test_one_model_comes_out(method: str, data: st.DataObject) -> None:
    """With neutral parameters a single model is the result, exactly where nothing rounds."""
    dtype = data.draw(st.sampled_from([F32, BF16, F16, F8, F64]))
    case = data.draw(cases(dtype, most=1, kinds=EXACT, limits=taken(method)))
    assert_identity(method, case, drawn(data, method, **neutral(method)))


@every_method("identity")
@given(data=st.data())
@FEW
def test_one_model_comes_out_within_a_rounding(method: str, data: st.DataObject) -> None:
    """Any float32 model is the result within the rounding of its difference to the base."""
    case = data.draw(cases(most=1, kinds=("normal",), limits=taken(method)))
    assert_identity_within(method, case, drawn(data, method, **neutral(method)), 2.0**-23)


@every_method("double")
@given(data=st.data())
@FEW
def test_float64_is_not_narrowed(method: str, data: st.DataObject) -> None:
    """A float64 model survives its merge to float64's precision, whatever the base is stored in."""
    base_dtype = data.draw(st.sampled_from([F64, F32]))
    case = data.draw(cases(base_dtype, most=1, kinds=("normal",), limits=taken(method)))
    fine = np.random.default_rng(0)
    model = {
        name: np.asarray(array.astype(F64) + 2.0**-30 * fine.random(array.shape))
        for name, array in case.models[0].items()
    }
    case = type(case)(
        {name: array.astype(F64) for name, array in case.base.items()}, (model,), (1.0,)
    )
    assert_identity_within(method, case, drawn(data, method, **neutral(method)), 2.0**-52)


@every_method("double")
@given(data=st.data())
@FEW
def test_both_precisions_in_one_model(method: str, data: st.DataObject) -> None:
    """A model of float32 and float64 tensors merges as the same numbers in float64 do.

    Within the tolerance it declares where LAPACK is behind it, for singular values that differ.
    """
    params = drawn(data, method)
    tolerance = tolerance_of(METHODS[method](**params))
    kinds = ("normal",) if tolerance else EXACT
    case = data.draw(cases(most=2, kinds=kinds, limits=taken(method))).unweighted
    some = data.draw(st.sets(st.sampled_from(sorted(case.base)), min_size=1))
    mixed = case.mapped(np.copy)
    for each in (mixed.base, *mixed.models):
        each.update({name: each[name].astype(F64) for name in some})
    wide = case.astype(F64)
    with drawn_by_label():
        assert_close(
            merged(method, mixed, params), merged(method, wide, params), max(tolerance, 1e-6)
        )
    chain = METHODS[method](**params)
    got, expected = (apply(chain, each.task_vectors, base=each.base) for each in (mixed, wide))
    assert_close(got, expected, max(tolerance, 1e-6))


@every_method("base at zero")
@given(data=st.data())
@SOME
def test_scale_zero_is_the_base(method: str, data: st.DataObject) -> None:
    """λ = 0 gives the bits of the base, negative zeros included."""
    dtype = data.draw(st.sampled_from([F32, BF16, F16, F64]))
    case = data.draw(cases(dtype, limits=taken(method)).map(_with_negative_zero))
    assert_base_at_zero(method, case, drawn(data, method, lam=0.0))


def _with_negative_zero(case: Any) -> Any:
    case.base["model.layers.0.attn.bias"][2] = -0.0
    return case


@every_method("homogeneous")
@given(data=st.data())
@SOME
def test_powers_of_two_pass_through(method: str, data: st.DataObject) -> None:
    """Scaling every task vector by a power of two scales the result by it, exactly."""
    power = data.draw(st.sampled_from([-5, -1, 1, 7]))
    assert_homogeneous(method, data.draw(cases(limits=taken(method))), drawn(data, method), power)


@every_method("in memory")
@given(data=st.data())
@SOME
def test_apply_on_arrays_is_the_merge(method: str, data: st.DataObject) -> None:
    """`apply` gives the values that the streaming engine gives."""
    assert_apply_is_merge(method, data.draw(cases(limits=taken(method))), drawn(data, method))


@every_method("rounded once")
@given(data=st.data())
@SOME
def test_small_dtypes_are_rounded_once(method: str, data: st.DataObject) -> None:
    """Small dtypes are merged in float32 and rounded once, at the end."""
    dtype = data.draw(st.sampled_from([BF16, F16, F8, F8_WIDE]))
    case = data.draw(cases(dtype, limits=taken(method)))
    assert_rounded_once(method, case, drawn(data, method))


@every_method("buffers")
@given(data=st.data())
@SOME
def test_integers_are_copied(method: str, data: st.DataObject) -> None:
    """Integer and boolean tensors are the base's, and an error where a model has others."""
    case, params = data.draw(cases(limits=taken(method))), drawn(data, method)
    assert_buffers_kept(method, case, params, BUFFERS, data.draw(st.sampled_from(list(BUFFERS))))


@every_method("buffers")
def test_dtypes_that_no_file_holds_are_refused(method: str) -> None:
    """Arrays and tensors of dtypes without a name in safetensors are an error that names it."""
    for table in (
        {"w": np.ones(3, np.complex128)},
        {"w": np.array(["a"])},
        {"w": torch.zeros(3).to(torch.float8_e4m3fnuz)},
    ):
        with pytest.raises(MergebenchError, match=r"<U1|e4m3fnuz|complex128"):
            merge_models([table], base=table, method=method)


@every_method("sweep")
@given(data=st.data())
@FEW
def test_a_list_of_values_is_that_many_merges(method: str, data: st.DataObject) -> None:
    """Several values of a parameter give, in one reading, the bits of separate merges."""
    params = drawn(data, method)
    key = data.draw(st.sampled_from(sorted(params)))
    wanted = values_of(METHODS[method].params[key]).filter(
        lambda value: accepted(METHODS[method], {**params, key: value})
    )
    several = data.draw(st.lists(wanted, min_size=1, max_size=3, unique=True))
    assert_sweep_is_single(method, data.draw(cases(limits=taken(method))), params, key, several)
