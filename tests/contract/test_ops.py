"""Every registered op: what its declaration says is what its implementation does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mergebench.compute.tiles import Tiling
from mergebench.core.site import make_sites
from mergebench.core.tensor import ArrayTensor
from mergebench.merge.at import Statistic
from mergebench.merge.chains import coefficients
from mergebench.merge.engine import execute_in_memory
from mergebench.merge.op import OPS, Op
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from mergebench.sources import source_of_arrays
from mergebench.steps import OpRef
from tests.unit.sweeps import Tables

from .array_promises import in_torch
from .assertions import assert_close, assert_same_bits, assert_same_values, assert_within_ulps
from .collecting import files_of, invented, needs
from .exemptions import NEARLY_CANCEL, SHAPED_BY_DATA
from .promises import WHOLE
from .support import (
    F32,
    F64,
    FEW,
    GENERIC,
    KINDS,
    SHAPES,
    SOME,
    Arrays,
    Case,
    apply_each,
    cases,
    drawn_for_op,
    every_op,
    taken_by_op,
)

#: Parameters with which an op measures nothing that decides what it does.
UNMEASURED: Mapping[str, Any] = {
    "density": 1.0, "gamma": 0.0, "scope": "row", "tie": "plus", "select_topk": 1.0, "r": 0.0,
    "over": "full",
}  # fmt: skip


#: Ops whose measurement reads numbers, wherever they are; what they then do with them is tested.
ON_HOST = {"compete", "deintrude", "flexmerge"}


@contextmanager
def measured_elsewhere(op: Op, count: int) -> Iterator[None]:
    """Let an op have measured other data than those that it is given next."""
    statistic = op.statistic
    if statistic is None:
        yield
        return
    random = np.random.default_rng(0).normal(size=(count, 12)).astype(F32)
    value = statistic.measure(Tables({"w": random}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(op), "statistic", Statistic("model", lambda sweep: value))
        yield


def op_of(data: st.DataObject, name: str, **fixed: Any) -> Op:
    """An op with drawn parameters."""
    return OPS[name](**drawn_for_op(data, name, **fixed))


def results(op: Op, case: Case, keys: Sequence[int] | None = None) -> list[Arrays]:
    """One dictionary of arrays per model that the op leaves."""
    how = {"base": case.base, "keys": keys, "marks": case.marks or None}
    out = apply_each(op, case.task_vectors, case.weights, **how)
    return [out] if isinstance(out, Mapping) else out


@every_op("untouched inputs")
@given(data=st.data())
@FEW
def test_ops_do_not_write_to_what_they_get(name: str, data: st.DataObject) -> None:
    """An op runs on stacks that cannot be written to, and gives the shape that it declares."""
    op, case = (
        op_of(data, name),
        data.draw(cases(kinds=("exact", "normal"), limits=taken_by_op(name))),
    )
    seen = []

    original = op.spec.function
    count = len(case.models)

    def guarded(stack: np.ndarray, at: Any, **params: Any) -> np.ndarray:
        stack.flags.writeable = False
        before = stack.copy()
        out = original(stack, at, **params)
        assert_same_bits({"stack": stack}, {"stack": before})
        seen.append((stack.shape, out.shape, out.dtype))
        return out

    object.__setattr__(op.spec, "function", guarded)
    try:
        results(op, case)
    finally:
        object.__setattr__(op.spec, "function", original)
    shapes = {tensor: array.shape for tensor, array in case.base.items()}
    wants = needs(op)
    assert len(seen) == len(shapes if wants is None else invented(wants, shapes, 0))
    for before, after, dtype in seen:
        assert before[0] == count
        assert after == ((1 if op.spec.reduces else count), before[1])
        assert dtype == F32


@every_op("double")
@given(data=st.data())
@GENERIC
def test_ops_keep_float64(name: str, data: st.DataObject) -> None:
    """In float64 an op gives float64 values, which float32 gives but for its rounding."""
    op = op_of(data, name)
    limits = taken_by_op(name)
    limits = replace(limits, signed=limits.signed and name not in NEARLY_CANCEL)
    case = data.draw(cases(kinds=("normal",), limits=limits))
    wide = results(op, case.astype(F64))
    assert {array.dtype for each in wide for array in each.values()} == {F64}
    for narrow, each in zip(results(op, case), wide, strict=True):
        assert_close(narrow, each, 1e-5, least=1.0)


@every_op("torch")
@given(data=st.data())
@SOME
def test_ops_agree_between_libraries(name: str, data: st.DataObject) -> None:
    """An op on torch tensors gives the values of numpy within an ulp, with the same mask."""
    op = op_of(data, name)
    kinds = ("normal",) if op.spec.tolerance else KINDS
    case = data.draw(cases(kinds=kinds, limits=taken_by_op(name)))
    (base,) = in_torch([case.base])
    out = apply_each(op, in_torch(case.task_vectors), case.weights, base=base)
    tables = [out] if isinstance(out, Mapping) else out
    for expected, got in zip(results(op, case), tables, strict=True):
        if op.spec.tolerance:
            arrays = {tensor: got[tensor].numpy() for tensor in expected}
            assert_close(arrays, expected, op.spec.tolerance)
            continue
        for tensor, array in expected.items():
            assert isinstance(got[tensor], torch.Tensor)
            assert_within_ulps(got[tensor].numpy(), array)


@pytest.mark.parametrize("name", [name for name in OPS if name not in SHAPED_BY_DATA])
@given(data=st.data())
@FEW
def test_ops_stay_on_the_device_of_their_input(name: str, data: st.DataObject) -> None:
    """No op mixes in an array of another device: where there is no data, none is missed."""
    declared = OPS[name].params
    fixed = {
        key: value
        for key, value in UNMEASURED.items()
        if key in declared and value in (declared[key].choices or (value,))
    }
    op = op_of(data, name, **fixed)
    count = OPS[name].most or 3
    tables = [{"w": torch.empty((3, 4), device="meta")}] * count
    with measured_elsewhere(op, count) if name in ON_HOST else nullcontext():
        out = apply_each(op, tables, [1.0, 0.5, 2.0][:count], base=tables[0])
    for each in [out] if isinstance(out, Mapping) else out:
        assert each["w"].device.type == "meta"
        assert each["w"].shape == (3, 4)


@every_op("homogeneous")
@given(data=st.data())
@FEW
def test_ops_pass_powers_of_two(name: str, data: st.DataObject) -> None:
    """An op on task vectors times 4 gives exactly 4 times what it gave."""
    op = op_of(data, name)
    case = data.draw(cases(limits=taken_by_op(name)))
    larger = case.mapped(lambda array: np.asarray(array * F32.type(4)))
    for plain, four in zip(results(op, case), results(op, larger), strict=True):
        assert_same_values(four, {n: np.asarray(a * F32.type(4)) for n, a in plain.items()})


@every_op("order")
@given(data=st.data())
@SOME
def test_ops_treat_models_alike(name: str, data: st.DataObject) -> None:
    """Models in another order come out in that order, or as the same one within a rounding."""
    op = op_of(data, name)
    assume(not op.ordered)
    # Equal singular values have no vectors of their own, so that rounding chooses them.
    kinds = ("normal",) if op.spec.tolerance else ("exact", "ternary")
    # A sum that is zero in one order only would elect another sign.
    case = data.draw(cases(least=2, kinds=kinds, limits=taken_by_op(name))).in_eighths
    order = data.draw(st.permutations(range(len(case.models))))
    shuffled = case.chosen(order)
    before, after = results(op, case), results(op, shuffled, order)
    if op.spec.reduces:
        # Sums of values times weights may round differently in another order.
        assert_close(after[0], before[0], 1e-5, least=1.0)
        return
    for place, index in enumerate(order):
        if op.spec.apart:
            # What is apart comes out of sums over all models too.
            assert_close(after[place], before[index], 1e-5, least=1.0)
        elif op.spec.tolerance:
            assert_close(after[place], before[index], op.spec.tolerance)
        else:
            assert_same_values(after[place], before[index])


def gradients(op: Op, case: Case) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """What an op gives for the first model it leaves, and the derivatives of its sum."""
    inputs = in_torch(case.task_vectors)
    for each in inputs:
        for tensor in each.values():
            tensor.requires_grad_()
    (base,) = in_torch([case.base])
    out = apply_each(op, inputs, case.weights, base=base)
    merged = out if isinstance(out, Mapping) else out[0]
    torch.stack([tensor.sum() for tensor in merged.values()]).sum().backward()
    zero = torch.zeros
    return merged, [
        {name: zero(t.shape) if t.grad is None else t.grad for name, t in each.items()}
        for each in inputs
    ]


@every_op("gradients")
@given(data=st.data())
@GENERIC
def test_gradients_pass_through_ops(name: str, data: st.DataObject) -> None:
    """Where something comes out of an op, some input has a derivative, and it is a number."""
    merged, slopes = gradients(
        op_of(data, name), data.draw(cases(F64, kinds=("normal",), limits=taken_by_op(name)))
    )
    flat = torch.cat([slope.reshape(-1) for each in slopes for slope in each.values()])
    assert torch.isfinite(flat).all()
    assert bool(flat.any()) == any(bool(tensor.any()) for tensor in merged.values())


LINEAR = [name for name in OPS if OPS[name].linear()]


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data())
@FEW
def test_linear_ops_are_their_coefficients(name: str, data: st.DataObject) -> None:
    """The derivatives of a linear op are the weights that `coefficients` says, everywhere."""
    op, case = (
        op_of(data, name),
        data.draw(cases(F64, kinds=("normal",), limits=taken_by_op(name))),
    )
    count = len(case.models)
    slopes = gradients(op, case)[1]
    for tensor, site in make_sites(SHAPES).items():
        first = np.reshape(coefficients((op,), site, case.weights), (-1, count))[0]
        for share, each in zip(first, slopes, strict=True):
            assert torch.allclose(each[tensor].double(), torch.tensor(share), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data())
@FEW
def test_ops_declared_linear_add_up(name: str, data: st.DataObject) -> None:
    """What is declared linear maps a sum of two cases to the sum of their results."""
    op, case = (
        op_of(data, name),
        data.draw(cases(kinds=("exact",), least=2, most=2, limits=taken_by_op(name))),
    )
    one, other = case.task_vectors
    weights = (case.weights[0],) * 2
    zero = {tensor: np.zeros_like(array) for tensor, array in one.items()}

    def run(*models: Arrays) -> Arrays:
        out = apply_each(op, models, weights)
        return out if isinstance(out, Mapping) else out[0]

    total = {tensor: np.asarray(one[tensor] + other[tensor]) for tensor in one}
    parts = run(one, zero), run(other, zero)
    together = {tensor: np.asarray(parts[0][tensor] + parts[1][tensor]) for tensor in one}
    assert_close(run(total, zero), together, 1e-5, least=1.0)


@every_op("tiling")
@given(data=st.data())
@SOME
def test_granularity_is_fine_enough(name: str, data: st.DataObject) -> None:
    """Streamed in pieces of its declared granularity an op gives the bits of the whole."""
    case = data.draw(cases(limits=taken_by_op(name)))
    op = op_of(data, name)
    chain = (OpRef(name, dict(op.params)), *([] if op.spec.reduces else [OpRef("sum")]))
    # Ops of diffusion models refuse the names of others.
    tables = [
        {key.replace("model.", "model.diffusion_model."): array for key, array in each.items()}
        for each in (*case.models, case.base)
    ]
    labels = [f"models[{i}]" for i in range(len(case.models))]
    opened = [
        source_of_arrays(label, {key: ArrayTensor(array) for key, array in each.items()})
        for label, each in zip([*labels, "base"], tables, strict=True)
    ]
    recipe = Recipe(tuple(map(ModelRef, labels, case.weights)), method="", ops=chain, base="base")
    files = files_of(needs(op), tables[:-1], None)
    plan = make_plan(recipe, sources=opened[:-1], base=opened[-1], statistics=files, workers=1)
    tiling = Tiling(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 30)), 2)
    (whole,) = execute_in_memory(replace(plan, tiling=WHOLE))
    (pieces,) = execute_in_memory(replace(plan, tiling=tiling))
    assert_same_bits(pieces, whole)
