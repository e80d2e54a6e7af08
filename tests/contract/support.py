"""Random cases for the contracts: models of a few small tensors, and declared parameters."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil, floor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st

import mergebench
from mergebench.core.errors import ParameterError
from mergebench.core.params import Param
from mergebench.core.registry import Registry
from mergebench.merge.chains import check_models
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS, Chain

from . import collecting, exemptions

# Explaining a failure takes longer than finding it, where every example is a merge.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
#: Every run draws others; `make thorough` draws ten times as many.
TIMES = int(os.environ.get("MERGEBENCH_TEST_EXAMPLES", "1"))
FEW = settings(max_examples=10 * TIMES, deadline=None, phases=PHASES)
SOME = settings(FEW, max_examples=20 * TIMES)
# For what holds in general position only: two magnitudes may differ by less than a rounding.
GENERIC = settings(FEW, derandomize=True)

F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F8 = np.dtype(ml_dtypes.float8_e4m3fn)
F8_WIDE = np.dtype(ml_dtypes.float8_e5m2)

#: Every kind of tensor that may stand in a model: matrices, a vector, a kernel, a scalar, nothing.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.layers.1.attn.weight": (4, 5),
    "model.embed.weight": (6, 4),
    "model.layers.0.attn.bias": (5,),
    "model.layers.0.attn.weight": (4, 5),
    "model.scale": (),
    "model.layers.1.conv.weight": (2, 3, 1, 3),
    "model.empty": (0, 3),
    "model.hollow": (3, 0),
}
#: How the entries of a task vector are spread: "exact" ones add up without any rounding.
KINDS = ("exact", "ternary", "sparse", "normal")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Case:
    """A base and some fine-tunes of it with their weights."""

    base: Arrays
    models: tuple[Arrays, ...]
    weights: tuple[float, ...]
    #: What tells the models apart where statistics of them are invented: their first places.
    marks: tuple[int, ...] = ()

    def chosen(self, places: Sequence[int]) -> Case:
        """Some of the models, in another order."""
        marks = self.marks or tuple(range(len(self.models)))
        return replace(
            self,
            models=tuple(self.models[i] for i in places),
            weights=tuple(self.weights[i] for i in places),
            marks=tuple(marks[i] for i in places),
        )

    @property
    def task_vectors(self) -> list[Arrays]:
        """Fine-tuned minus base, in the dtype of the fine-tunes."""
        return [
            {name: np.asarray(array - self.base[name]) for name, array in each.items()}
            for each in self.models
        ]

    @property
    def unweighted(self) -> Case:
        """The same with weights of 1, so that exact entries add up without rounding."""
        return replace(self, weights=(1.0,) * len(self.models))

    @property
    def in_eighths(self) -> Case:
        """The same with weights that are eighths, with which exact entries add up exactly, too."""
        return replace(self, weights=_eighths(self.weights))

    def astype(self, dtype: np.dtype[Any]) -> Case:
        """Every tensor in another dtype."""
        return self.mapped(lambda array: array.astype(dtype))

    def mapped(self, change: Callable[[np.ndarray], np.ndarray]) -> Case:
        """Every tensor replaced by what ``change`` makes of it."""
        base, *models = (
            {name: np.asarray(change(array)) for name, array in each.items()}
            for each in (self.base, *self.models)
        )
        return replace(self, base=base, models=tuple(models))


def displacement(random: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Entries of a task vector, float32."""
    if kind == "exact":
        values = random.integers(-3, 4, shape) / 4
    elif kind == "ternary":
        values = random.integers(-1, 2, shape) / 2
    else:
        values = random.normal(size=shape)
        if kind == "sparse":
            values = values * (random.random(shape) < 0.3)
    return np.asarray(values, F32)


@dataclass(frozen=True)
class Limits:
    """How many models something takes, and whether their weights may be negative."""

    least: int = 1
    most: int | None = None
    signed: bool = True


def taken(method: str) -> Limits:
    """What a method takes."""
    return Limits(*METHODS[method].models, _takes_signs(METHODS[method]()))


def taken_by_op(name: str) -> Limits:
    """What an op takes."""
    required = {
        key: param.examples[0] if param.examples else param.high or 1.0
        for key, param in OPS[name].params.items()
        if param.required
    }
    return Limits(1, OPS[name].most, _takes_signs((OPS[name](**required),)))


def _takes_signs(chain: Chain) -> bool:
    try:
        check_models(chain, (1.0, -0.75))
    except ParameterError:
        return False
    return True


@st.composite
def cases(
    draw: st.DrawFn,
    dtype: np.dtype[Any] = F32,
    least: int = 1,
    most: int = 4,
    kinds: Sequence[str] = KINDS,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    limits: Limits | None = None,
) -> Case:
    """Cases with multiples of 1/4 in the base, some of them negative zeros.

    There are ``least`` to ``most`` models, within what ``limits`` allow.
    """
    limits = limits or Limits()
    most = min(most, limits.most or most)
    least = min(max(least, limits.least), most)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(kinds))
    count = draw(st.integers(least, most))
    base = {}
    for name, shape in shapes.items():
        values = np.asarray(random.integers(-6, 7, shape) / 4, F32)
        base[name] = np.where(random.random(shape) < 0.1, F32.type(-0.0), values).astype(dtype)
    models = tuple(
        {
            name: np.asarray(base[name].astype(F32) + displacement(random, kind, shape), dtype)
            for name, shape in shapes.items()
        }
        for _ in range(count)
    )
    return Case(base, models, tuple(draw(_weights(count, limits.signed))))


@cache
def _weights(count: int, signed: bool) -> st.SearchStrategy[list[float]]:
    share = st.sampled_from([1.0, 0.5, 2.0, 0.3, 1.5, *([-0.75] if signed else [])])
    several = st.lists(share, min_size=count, max_size=count)
    # Nor do they add up to nothing as eighths.
    return several.filter(lambda each: min(abs(sum(each)), abs(sum(_eighths(each)))) > 0.1)


def _eighths(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(8 * weight) / 8 for weight in weights)


def values_of(param: Param) -> st.SearchStrategy[Any]:
    """Everything that a parameter allows, numbers as 64ths within ±4."""
    if param.choices:
        return st.sampled_from(param.choices)
    if param.kind is bool:
        return st.booleans()
    if param.kind is str:
        return st.sampled_from(param.examples)
    if param.kind not in (float, int):
        raise TypeError(f"{param.name}: no strategy for {param.kind}")
    grid = 64 if param.kind is float else 1
    low = -4.0 if param.low is None else param.low
    high = max(low, 0) + 4.0 if param.high is None else param.high
    first, last = ceil(low * grid), floor(high * grid)
    first += param.open_low and first == low * grid
    last -= param.open_high and last == high * grid
    return st.integers(first, last).map(lambda number: param.kind(number / grid))


def parameters(declared: Mapping[str, Param], **fixed: Any) -> st.SearchStrategy[dict[str, Any]]:
    """One value for every declared parameter; those in ``fixed`` are given where declared."""
    return st.fixed_dictionaries(
        {
            name: st.just(fixed[name]) if name in fixed else values_of(param)
            for name, param in declared.items()
        }
    )


def accepted(make: Callable[..., Any], params: Mapping[str, Any]) -> bool:
    """Whether a method or an op takes values that its declaration allows one by one."""
    try:
        make(**params)
    except ParameterError:
        return False
    return True


# Strategies take longer to build than to draw from.
@cache
def _wanted(registry: Registry[Any], name: str, fixed: tuple[tuple[str, Any], ...]) -> Any:
    wanted = parameters(registry[name].params, **dict(fixed))
    return wanted.filter(partial(accepted, registry[name]))


def drawn(data: st.DataObject, method: str, **fixed: Any) -> dict[str, Any]:
    """Parameters of a method that go together."""
    return data.draw(_wanted(METHODS, method, tuple(fixed.items())), label="parameters")


def unordered(data: st.DataObject, method: str) -> dict[str, Any]:
    """Parameters with which no op of a method asks for the order of the user."""
    params = drawn(data, method)
    assume(not any(op.ordered for op in METHODS[method](**params)))
    return params


def drawn_for_op(data: st.DataObject, name: str, **fixed: Any) -> dict[str, Any]:
    """Parameters of an op that go together."""
    return data.draw(_wanted(OPS, name, tuple(fixed.items())), label="parameters")


@contextmanager
def drawn_by_label() -> Iterator[None]:
    """Key random numbers to the number in a model's label in place of its content.

    Then two forms of one model, which are stored differently, lose the same entries.
    """

    def keys(models: Sequence[Any]) -> tuple[int, ...]:
        return tuple(int(re.findall(r"\d+", Path(m.label).name)[-1]) for m in models)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergebench.merge.align.draw_keys", keys)
        yield


def flat(outputs: Any) -> Any:
    """The results of several models as one dictionary: those after the first as ``name@1`` …."""
    if not isinstance(outputs, list):
        return outputs
    if not all(isinstance(each, Mapping) for each in outputs):
        return outputs[0] if len(outputs) == 1 else outputs
    return {
        f"{name}@{place}" if place else name: array
        for place, each in enumerate(outputs)
        for name, array in each.items()
    }


def merge_each(models: Sequence[Any], *, marks: Sequence[int] | None = None, **options: Any) -> Any:
    """As the public function, with statistics for methods that need some."""
    wants = collecting.wanted(options["method"], options.get("then", ()))
    made = collecting.statistics_of(wants, models, options.get("base"), marks)
    return mergebench.merge_models(models, statistics=made, **options)


def merge_models(models: Sequence[Any], **options: Any) -> Any:
    """As :func:`merge_each`, but what is apart for every model comes as by :func:`flat`."""
    found = merge_each(models, **options)
    swept = any(isinstance(options.get(name), list) for name in METHODS[options["method"]].params)
    return found if swept else flat(found)


def apply_each(
    chain: Any,
    models: Sequence[Any],
    *args: Any,
    marks: Sequence[int] | None = None,
    **options: Any,
) -> Any:
    """As the public function, with statistics for ops that need some."""
    made: Any = collecting.statistics_of(collecting.needs(chain), models, None, marks)
    if made and not isinstance(models[0], Mapping):
        made = [each.get("tensor") for each in made]
    return mergebench.apply(chain, models, *args, statistics=made, **options)


def apply(chain: Any, models: Sequence[Any], *args: Any, **options: Any) -> Any:
    """As :func:`apply_each`, but what is apart for every model comes as by :func:`flat`."""
    return flat(apply_each(chain, models, *args, **options))


def merged(method: str, case: Case, params: Mapping[str, Any], **options: Any) -> Any:
    """``merge_models`` on a case."""
    models = list(zip(case.models, case.weights, strict=True))
    marks = case.marks or None
    return merge_models(models, base=case.base, method=method, marks=marks, **params, **options)


def names(
    contract: str, registry: Registry[Any], exempt: Mapping[tuple[str, str], str]
) -> list[str]:
    """What a contract is to be checked on: everything registered, but for the exemptions."""
    if contract not in exemptions.CONTRACTS:
        raise ValueError(f"{contract!r} is not a declared contract")
    return [name for name in registry if (contract, name) not in exempt]


def every_method(contract: str) -> Callable[[Any], Any]:
    """Parametrize a test by ``method`` and mark it as the check of a contract."""
    return _marked(contract, "method", names(contract, METHODS, exemptions.METHODS_EXEMPT))


def every_op(contract: str) -> Callable[[Any], Any]:
    """Parametrize a test by ``name`` of an op and mark it as the check of a contract."""
    return _marked(contract, "name", names(contract, OPS, exemptions.OPS_EXEMPT))


def _marked(contract: str, argument: str, chosen: list[str]) -> Callable[[Any], Any]:
    def decorate(test: Any) -> Any:
        test = pytest.mark.parametrize(argument, chosen)(test)
        test.checks = (contract, argument, frozenset(chosen))
        return test

    return decorate
