"""What must not change a bit: order, tiles, workers, memory, files, strides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mergebench.compute.tiles import Tiling
from mergebench.merge.chains import granularity_of
from mergebench.merge.engine import execute_in_memory
from mergebench.merge.limits import choose_tiling
from mergebench.merge.method import METHODS

from .assertions import assert_same_bits
from .promises import (
    assert_inputs_untouched,
    assert_layout_free,
    assert_order_free,
    assert_same_from_files,
    assert_tiling_free,
    planned,
)
from .support import (
    BF16,
    F16,
    F32,
    FEW,
    SOME,
    Case,
    cases,
    drawn,
    every_method,
    flat,
    merged,
    taken,
    unordered,
)


@every_method("order")
@given(data=st.data())
@SOME
def test_order_of_models_is_immaterial(method: str, data: st.DataObject) -> None:
    """Models and weights in any order give the same bits."""
    case = data.draw(cases(least=2, limits=taken(method)))
    order = data.draw(st.permutations(range(len(case.models))))
    assert_order_free(method, case, unordered(data, method), order)


@every_method("order")
@given(data=st.data())
@FEW
def test_order_of_models_that_differ_in_few_entries_is_immaterial(
    method: str, data: st.DataObject
) -> None:
    """Even where models differ in a single stretch of a long tensor, their order is immaterial."""
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    base = {"w": random.normal(size=4000).astype(F32)}
    models, count = [], min(3, taken(method).most or 3)
    for _ in range(count):
        model = base["w"].copy()
        model[200:1000] += random.normal(size=800).astype(F32)
        models.append({"w": model})
    case = Case(base, tuple(models), (1.0,) * count)
    order = data.draw(st.permutations(range(count)))
    assert_order_free(method, case, unordered(data, method), order)


@every_method("tiling")
@given(data=st.data())
@SOME
def test_tiles_and_jobs_are_immaterial(method: str, data: st.DataObject) -> None:
    """Tiny odd tiles on one to three workers give the bits of one big tile."""
    tile = data.draw(st.integers(1, 17))
    tiling = Tiling(tile, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3)))
    assert_tiling_free(method, data.draw(cases(limits=taken(method))), drawn(data, method), tiling)


@every_method("tiling")
@given(data=st.data())
@settings(FEW, max_examples=3, phases=(Phase.generate,))
def test_workers_and_memory_are_immaterial(method: str, data: st.DataObject) -> None:
    """One, two and three workers and any sufficient memory budget give the same bits."""
    shapes = {"b": (160, 257), "a": (70, 601), "c": (3, 5), "v": (4099,)}
    case = data.draw(cases(shapes=shapes, least=2, most=3, limits=taken(method)))
    params = drawn(data, method)
    plan = planned(method, case, params)
    least = plan.least_memory
    budgets = [least, least + (1 << 18), least + (1 << 20), 1 << 34]

    def tiling(workers: int, memory: int) -> Tiling:
        # All that a plan takes from either; making whole plans takes longer than running them.
        return choose_tiling(plan.aligned, plan.variants, plan.package, memory, workers)[0]

    tilings = {tiling(1, budget) for budget in budgets}
    # Where a whole tensor is the smallest piece, a single worker has no choice.
    choices = 1 if granularity_of(METHODS[method](**params)) == "tensor" else 3
    assert len(tilings) >= choices, "the budgets must lead to different tilings"
    tilings |= {tiling(workers, budget) for workers in (2, 3) for budget in budgets}
    asked = {"workers": 3, "memory": budgets[1]}
    assert planned(method, case, params, **asked).tiling == tiling(3, budgets[1])
    expected = merged(method, case, params, **asked)
    for each in tilings:
        assert_same_bits(flat(execute_in_memory(replace(plan, tiling=each))), expected)


@every_method("files")
@given(data=st.data())
@FEW
def test_streamed_is_in_memory(
    method: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From safetensors files, returned or written, come the bits of a merge in memory."""
    dtype = data.draw(st.sampled_from([F32, BF16]))
    folder = tmp_path_factory.mktemp("streamed")
    assert_same_from_files(
        method, data.draw(cases(dtype, limits=taken(method))), drawn(data, method), folder
    )


@every_method("untouched inputs")
@given(data=st.data())
@FEW
def test_inputs_are_not_written_to(method: str, data: st.DataObject) -> None:
    """Read-only arrays can be merged, and torch tensors are left as they were."""
    dtype = data.draw(st.sampled_from([F32, F16]))
    assert_inputs_untouched(
        method, data.draw(cases(dtype, limits=taken(method))), drawn(data, method)
    )


@every_method("layout")
@given(data=st.data())
@FEW
def test_strides_are_immaterial(method: str, data: st.DataObject) -> None:
    """Column-major, strided and reversed arrays give the bits of contiguous ones."""
    assert_layout_free(method, data.draw(cases(limits=taken(method))), drawn(data, method))
