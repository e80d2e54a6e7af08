"""Parameters: what is declared is what is accepted."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergebench.core.errors import ParameterError
from mergebench.core.params import Param
from mergebench.merge.engine import execute_in_memory
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS

from .promises import planned
from .support import (
    FEW,
    Case,
    accepted,
    drawn,
    drawn_for_op,
    every_method,
    every_op,
    merge_models,
    values_of,
)

MODEL = {"w": np.ones((2, 3), np.float32)}


def forbidden(param: Param) -> list[Any]:
    """Values that a parameter's declaration rules out."""
    if param.choices:
        return ["nonsense", "", None, 3, [], *(f"{choice} " for choice in param.choices)]
    if param.kind is bool:
        return ["maybe", 2, None, "", 0.5]
    if param.kind is str:
        return [None, {}, True, b"bytes"]
    wrong: list[Any] = ["many", "", None, True, [], {}, float("nan"), float("inf"), "-inf"]
    wrong.append(0.5 if param.kind is int else 10**400)
    if param.low is not None:
        wrong += [param.low - 1, str(param.low - 0.25), *([param.low] if param.open_low else [])]
    if param.high is not None:
        wrong += [
            param.high + 1,
            f"{param.high + 0.25}",
            *([param.high] if param.open_high else []),
        ]
    return wrong


@every_method("parameters")
def test_methods_refuse_what_they_do_not_declare(method: str) -> None:
    """Every value outside of a parameter's declaration is refused, naming method and parameter."""
    for name, param in METHODS[method].params.items():
        for value in forbidden(param):
            with pytest.raises(ParameterError) as caught:
                METHODS[method].expand({name: value})
            assert caught.value.what == f"{method}: `{name}` must be {param.describe()}"
            assert caught.value.got == str(value)


@every_method("parameters")
def test_merges_refuse_before_they_read(method: str) -> None:
    """`merge_models` refuses a forbidden value, a list with one, and a list of none."""
    for name, param in METHODS[method].params.items():
        for value in ("nonsense", ["nonsense"], []):
            with pytest.raises(ParameterError, match=f"['`]{name}['`]"):
                merge_models([MODEL], base=MODEL, method=method, **{name: value})
        with pytest.raises(ParameterError, match=f"{method}: no parameter `{name}x`"):
            merge_models([MODEL], base=MODEL, method=method, **{name + "x": param.default})


@every_method("parameters")
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "-inf"])
def test_weights_are_finite(method: str, weight: Any) -> None:
    """A weight that is no finite number is refused before anything is merged."""
    with pytest.raises(ParameterError, match="weight"):
        merge_models([(MODEL, 1.0), (MODEL, float(weight))], base=MODEL, method=method)


@every_method("parameters")
@pytest.mark.parametrize("workers", [0, -1])
def test_workers_are_at_least_one(method: str, workers: int) -> None:
    """No merge runs on no worker."""
    with pytest.raises(ParameterError, match=f"workers, expected at least 1, got {workers}"):
        merge_models([MODEL], base=MODEL, method=method, workers=workers)


@every_method("parameters")
def test_weights_that_cannot_be_merged_are_refused_by_the_plan(method: str) -> None:
    """Weights that a method cannot take are refused before data are read; others plan and run."""
    case = Case(MODEL, (MODEL, MODEL), (1.0, -1.0))
    try:
        plan = planned(method, case, {})
    except ParameterError:
        return
    execute_in_memory(plan)


@every_method("parameters")
def test_presets_hold_declared_values(method: str) -> None:
    """Every compat preset expands to allowed values, and explicit parameters win over it."""
    declared = METHODS[method].params
    for preset, values in METHODS[method].compat.items():
        expanded = METHODS[method].expand({}, preset)
        assert set(expanded) == set(declared)
        for name, value in values.items():
            assert declared[name].check(value, method) == value == expanded[name]
            other = next(v for v in samples(declared[name]) if v != value)
            assert METHODS[method].expand({name: other}, preset) == {**expanded, name: other}
    with pytest.raises(ParameterError, match=f"{method}: no compat preset 'nonsense'"):
        METHODS[method].expand({}, "nonsense")


def samples(param: Param) -> list[Any]:
    """A few allowed values."""
    if param.choices:
        return list(param.choices)
    if param.kind is bool:
        return [True, False]
    if param.kind is str:
        return list(param.examples)
    low = 0.0 if param.low is None else param.low
    if param.kind is int:
        return [int(low) + 1, int(low) + 2]
    high = low + 2.0 if param.high is None else param.high
    if param.kind is int:
        return [int(low), int(high)]
    return [low + (high - low) * share for share in (0.25, 0.5)]


@every_method("parameters")
@given(data=st.data())
@FEW
def test_texts_are_read_as_values(method: str, data: st.DataObject) -> None:
    """A parameter written as text, as on the command line, is the same parameter."""
    params = drawn(data, method)
    texts = {name: str(value) for name, value in params.items()}
    assert METHODS[method].expand(texts) == params
    assert METHODS[method](**texts) == METHODS[method](**params)


@every_method("description")
@given(data=st.data())
@FEW
def test_chains_are_their_content(method: str, data: st.DataObject) -> None:
    """Chains of equal parameters are equal in every respect; of others they differ and say so."""
    params, other = drawn(data, method), drawn(data, method)
    chain, again = METHODS[method](**params), METHODS[method](**dict(params))
    assert chain == again
    assert hash(chain) == hash(again)
    assert [str(op) for op in chain] == [str(op) for op in again]
    assert pickle.loads(pickle.dumps(chain)) == chain
    assert tuple(OPS[op.name](**dict(op.params)) for op in chain) == chain
    different = METHODS[method](**other)
    assert (chain == different) == ([str(op) for op in chain] == [str(op) for op in different])


@every_method("description")
def test_every_parameter_reaches_the_chain(method: str) -> None:
    """No declared parameter is without effect on the chain."""
    for name, param in METHODS[method].params.items():
        chains = {METHODS[method](**{name: value}) for value in samples(param)}
        assert len(chains) == len(samples(param)), name


@every_method("description")
def test_methods_say_what_they_are(method: str) -> None:
    """A method names its source and describes itself and each of its parameters."""
    entry = METHODS[method]
    assert entry.name == method
    assert entry.paper.startswith(("arXiv:", "doi:", "https://"))
    assert entry.summary.endswith(".")
    for name in entry.params:
        assert f"\n{name} : " in entry.doc, name


@every_op("parameters")
def test_ops_refuse_what_they_do_not_declare(name: str) -> None:
    """Every value outside of an op's declaration is refused, naming op and parameter."""
    declared: Mapping[str, Param] = OPS[name].params
    whole = {each: samples(param)[0] for each, param in declared.items()}
    for each, param in declared.items():
        for value in forbidden(param):
            with pytest.raises(ParameterError) as caught:
                OPS[name](**{**whole, each: value})
            assert caught.value.what == f"{name}: `{each}` must be {param.describe()}"
    with pytest.raises(ParameterError, match=f"{name}: no parameter `nonsense`"):
        OPS[name](**{**whole, "nonsense": 1})
    if required := [each for each, param in declared.items() if param.required]:
        with pytest.raises(ParameterError, match=f"{name}: `{required[0]}` is required"):
            OPS[name]()


@every_op("description")
@given(data=st.data())
@FEW
def test_ops_print_what_they_hold(name: str, data: st.DataObject) -> None:
    """An op prints as its name and every parameter with its value."""
    params = drawn_for_op(data, name)
    inside = ", ".join(f"{key}={params[key]}" for key in OPS[name].params)
    assert str(OPS[name](**params)) == f"{name}({inside})"
    for key, param in OPS[name].params.items():
        value = data.draw(
            values_of(param).filter(lambda v, k=key: accepted(OPS[name], {**params, k: v}))
        )
        one, other = OPS[name](**params), OPS[name](**{**params, key: value})
        assert (one == other) == (params[key] == value)
