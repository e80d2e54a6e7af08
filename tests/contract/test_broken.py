"""The contracts fail when they should: on methods that break them, and on spoilt comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mergebench.compute.tiles import Tiling
from mergebench.merge.at import At, Stack
from mergebench.merge.chains import chain
from mergebench.merge.method import METHODS, merge_method
from mergebench.merge.op import OPS, Chain, op
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_

from . import array_promises, promises
from .assertions import (
    assert_close,
    assert_same_bits,
    assert_same_layout,
    assert_same_values,
    assert_within_ulps,
)
from .support import F32, F64, SHAPES, Case, displacement

Body = Callable[[Stack], Stack]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Register a method that sums, scales, and runs ``body`` on what comes out."""
    assert "ties" in METHODS
    assert "sum" in OPS
    monkeypatch.setattr(METHODS, "_entries", {**METHODS._entries})
    monkeypatch.setattr(OPS, "_entries", {**OPS._entries})

    def add(body: Body, last: bool = True) -> str:
        @op()
        def spoil(stack: Stack, at: At) -> Stack:
            """Break a promise."""
            return body(stack)

        @merge_method(paper="arXiv:0000.00000")
        def broken(lam: float = 1.0) -> Chain:
            """Break a promise."""
            steps = [sum_(), scale(lam)]
            return chain(*steps, spoil()) if last else chain(spoil(), *steps)

        return "broken"

    return add


def a_case(count: int = 2, kind: str = "exact", dtype: Any = F32) -> Case:
    """A fixed case."""
    random = np.random.default_rng(1)
    base = {name: displacement(random, "exact", shape) for name, shape in SHAPES.items()}
    base["model.layers.0.attn.bias"][0] = -0.0
    models = tuple(
        {name: np.asarray(a + displacement(random, kind, a.shape)) for name, a in base.items()}
        for _ in range(count)
    )
    case = Case(base, models, (1.0,) * count).astype(dtype)
    # Below what float32 can tell apart.
    return case.mapped(lambda array: array * (1 + 2.0**-40)) if dtype == F64 else case


def twice_the_gradient(stack: Stack) -> Stack:
    """The same values, another derivative."""
    return stack if isinstance(stack, np.ndarray) else 2 * stack - stack.detach()


def off_in_torch(stack: Stack) -> Stack:
    """Another value in another library."""
    return stack if isinstance(stack, np.ndarray) else stack * 1.000001


@pytest.mark.parametrize(
    ("body", "promise", "arguments"),
    [
        (lambda stack: stack * 0.5, promises.assert_identity, ()),
        (lambda stack: stack * 1.00001, promises.assert_identity_within, (2.0**-23,)),
        (lambda stack: stack.astype(F32), promises.assert_identity_within, (2.0**-52,)),
        (lambda stack: stack + 1, promises.assert_base_at_zero, ()),
        (lambda stack: stack * stack, array_promises.assert_homogeneous, (1,)),
        (lambda stack: stack - stack[:, :1], promises.assert_tiling_free, (Tiling(3, 7, 2),)),
        (off_in_torch, array_promises.assert_torch_agrees, ()),
        (twice_the_gradient, array_promises.assert_gradients, (0,)),
    ],
)
def test_broken_methods_are_caught(
    register: Callable[..., str], body: Body, promise: Callable[..., None], arguments: Any
) -> None:
    """A method that breaks a promise fails its check, and the sound one passes it."""
    wide = arguments == (2.0**-52,) or promise is array_promises.assert_gradients
    kind = "exact" if promise is promises.assert_identity else "normal"
    case = a_case(kind=kind, dtype=F64 if wide else F32)
    params = {"lam": 0.0 if promise is promises.assert_base_at_zero else 1.0}
    promise("task_arithmetic", case, params, *arguments)
    with pytest.raises(AssertionError):
        promise(register(body), case, params, *arguments)


def test_ops_that_write_to_their_stack_are_caught(register: Callable[..., str]) -> None:
    """An op that works in place spoils the next value of a sweep."""
    register(lambda stack: stack)

    @op()
    def scale_in_place(stack: Stack, at: At, lam: float) -> Stack:
        """Write to what the values of a sweep share."""
        stack *= lam
        return stack

    @merge_method(paper="arXiv:0000.00000")
    def in_place(lam: float = 1.0) -> Chain:
        """Break a promise."""
        return chain(sum_(), scale_in_place(lam))

    promises.assert_sweep_is_single("task_arithmetic", a_case(), {}, "lam", [2.0, 3.0])
    with pytest.raises(AssertionError):
        promises.assert_sweep_is_single("in_place", a_case(), {}, "lam", [2.0, 3.0])


def test_order_matters_to_a_method_that_takes_the_first(
    register: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were models not brought into an order of their own, taking the first one would show."""
    method = register(lambda stack: stack[:1, :] * 1.0 + stack * 0.0, last=False)
    case = a_case()
    promises.assert_order_free(method, case, {}, (1, 0))
    monkeypatch.setattr(
        "mergebench.merge.opening._canonical",
        lambda opened, recipe, weights, files: (
            tuple(opened),
            tuple(weights),
            tuple(range(len(opened))),
        ),
    )
    with pytest.raises(AssertionError):
        promises.assert_order_free(method, case, {}, (1, 0))


NUMBERS = np.array([1.0, -2.0, 0.0], F32)


def close(got: Any, expected: Any) -> None:
    """`assert_close` to 1e-5."""
    assert_close(got, expected, 1e-5)


def alike(got: Any, expected: Any) -> None:
    """`assert_within_ulps` on the tensor of a dictionary."""
    assert_within_ulps(got["w"], expected["w"])


@pytest.mark.parametrize(
    ("compare", "other"),
    [
        (assert_same_bits, np.array([1.0, -2.0, -0.0], F32)),
        (assert_same_values, np.nextafter(NUMBERS, F32.type(9))),
        (assert_same_layout, NUMBERS.astype(F64)),
        (assert_same_layout, NUMBERS.reshape(3, 1)),
        (close, NUMBERS + F32.type(3e-5)),
        (close, NUMBERS[:2]),
        (alike, NUMBERS * F32.type(1.0 + 3e-7)),
        (alike, NUMBERS + F32.type(1e-45)),
        (promises.assert_factored_is_dense, NUMBERS * F32.type(1.0001)),
    ],
)
def test_comparisons_fail_on_what_differs(
    compare: Callable[[Any, Any], None], other: np.ndarray
) -> None:
    """Each comparison passes on equal arrays and fails on other values, names and shapes."""
    compare({"w": NUMBERS}, {"w": NUMBERS})
    with pytest.raises(AssertionError):
        compare({"w": other}, {"w": NUMBERS})
    with pytest.raises((AssertionError, KeyError)):
        compare({"v": NUMBERS}, {"w": NUMBERS})
