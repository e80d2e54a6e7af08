"""Every named variant of every method against its equations in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mergebench import merge_models
from mergebench.merge.method import METHODS
from tests.oracle import methods

Arrays = dict[str, np.ndarray]
CASES = settings(
    max_examples=15,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)
#: Stored neither in the order of their names nor in that of their sizes.
SHAPES = {
    "b.weight": (3, 5),
    "a.bias": (7,),
    "B.weight": (4, 4),
    "c.scale": (),
    "a.conv": (2, 1, 3),
}
CONFLICTS = {"drop": "remove", "keep": "keep"}


@dataclass(frozen=True)
class Case:
    """Fine-tunes of one base with their weights; few levels, so that sums are exact and tie."""

    base: Arrays
    models: list[Arrays]
    weights: tuple[float, ...]
    density: float
    lam: float

    @property
    def task_vectors(self) -> dict[str, list[np.ndarray]]:
        """What the oracle takes."""
        return methods.task_vectors(self.base, self.per_model)

    @property
    def per_model(self) -> dict[str, list[np.ndarray]]:
        """The models tensor by tensor."""
        return {name: [model[name] for model in self.models] for name in self.base}

    def merged(self, method: str, **params: Any) -> Any:
        """What mergebench makes of it."""
        pairs = list(zip(self.models, self.weights, strict=True))
        return merge_models(pairs, base=self.base, method=method, **params)


def alone(method: str, tau: Mapping[str, Sequence[np.ndarray]], **params: Any) -> Any:
    """What a method makes of the first task vector by itself."""
    only = {name: np.asarray(each[0], np.float32) for name, each in tau.items()}
    zero = {name: np.zeros_like(array) for name, array in only.items()}
    return merge_models([only], base=zero, method=method, **params)


@st.composite
def cases(draw: st.DrawFn, *, levels: bool = True, signed: bool = True, most: int = 4) -> Case:
    """Multiples of 1/4 with many zeros and equals, or else random numbers."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, most))
    width = draw(st.integers(1, 4))

    def tensors(low: int, high: int) -> Arrays:
        if levels:
            drawn = {
                name: random.integers(low, high + 1, shape) / 4 for name, shape in SHAPES.items()
            }
        else:
            drawn = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
        return {name: np.asarray(array, np.float32) for name, array in drawn.items()}

    base = tensors(-4, 4)
    models = [
        {name: np.asarray(base[name] + tau) for name, tau in tensors(-width, width).items()}
        for _ in range(count)
    ]
    shares = [0.5, 1.0, 2.0, 0.25, *([-1.0, -0.5, 0.0] if signed else [])]
    weights = draw(st.lists(st.sampled_from(shares), min_size=count, max_size=count))
    density = draw(st.integers(1, 20)) / 20
    return Case(base, models, tuple(weights), density, draw(st.sampled_from([1.0, 0.5, 0.3])))


def assert_rounds_to(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Every float32 entry within four roundings of the float64 one, relative to the tensor."""
    assert set(got) == set(expected)
    for name, exact in expected.items():
        assert got[name].dtype == np.float32
        bound = 4 * np.finfo(np.float32).eps * max(np.abs(exact).max(initial=0.0), 1.0)
        error = np.abs(got[name].astype(np.float64) - exact).max(initial=0.0)
        assert error <= bound, (name, error, bound)


def assert_same_mask(
    got: Mapping[str, np.ndarray], tau: Mapping[str, Sequence[np.ndarray]], mask: np.ndarray
) -> None:
    """Exactly the kept non-zero entries are not zero, in the order of names and indices."""
    names = sorted(tau, key=str.encode)
    kept = np.concatenate([got[name].ravel() != 0 for name in names])
    nonzero = np.concatenate([tau[name][0].ravel() != 0 for name in names])
    assert np.array_equal(kept, mask & nonzero)


@pytest.mark.parametrize("levels", [True, False])
@given(data=st.data())
@CASES
def test_sums_and_means(levels: bool, data: st.DataObject) -> None:
    """Means of weights, sums of weights, and sums of task vectors on the base."""
    case = data.draw(cases(levels=levels, signed=False))
    mean = methods.linear(case.per_model, case.weights)
    assert_rounds_to(case.merged("linear"), mean)
    case = data.draw(cases(levels=levels))
    total = methods.linear(case.per_model, case.weights, normalize=False)
    assert_rounds_to(case.merged("linear", normalize=False), total)
    total = methods.task_arithmetic(case.task_vectors, case.weights)
    expected = methods.apply_to_base(case.base, total, case.lam)
    assert_rounds_to(case.merged("task_arithmetic", lam=case.lam), expected)


TRIMS = list(product(get_args(methods.Scope), get_args(methods.Count)))


@pytest.mark.parametrize(("scope", "count"), TRIMS)
@given(data=st.data())
@CASES
def test_ties_keeps_what_the_oracle_keeps(scope: Any, count: Any, data: st.DataObject) -> None:
    """Of one model TIES keeps the very entries of the oracle's mask, ties and zeros included."""
    case = data.draw(cases(most=1))
    tau = case.task_vectors
    (mask,) = methods.ties_mask(tau, case.density, scope, count)
    got = alone("ties", tau, density=case.density, scope=scope, count=count)
    assert_same_mask(got, tau, mask)


@pytest.mark.parametrize(("scope", "count"), TRIMS)
@given(data=st.data())
@CASES
def test_every_variant_of_ties(scope: Any, count: Any, data: st.DataObject) -> None:
    """All elections, sign rules, ties of signs and divisors, from one reading of the models."""
    signed = data.draw(st.booleans())
    case = data.draw(cases(signed=signed))
    # Of equal magnitudes with opposite signs either may be called the largest.
    divisors = [d for d in get_args(methods.Divisor) if d != "max" or not signed]
    choices: dict[str, list[Any]] = {
        "sign": list(get_args(methods.Sign)),
        "election": list(get_args(methods.Election)),
        "tie": list(get_args(methods.Tie)),
        "divisor": divisors,
    }
    cancelled = data.draw(st.sampled_from(["zero", "sum"]))
    settled = {"scope": scope, "count": count, "density": case.density}
    outputs = case.merged("ties", lam=case.lam, cancelled=cancelled, **settled, **choices)
    tau = case.task_vectors
    for values, got in zip(product(*choices.values()), outputs, strict=True):
        chosen = dict(zip(choices, values, strict=True))
        zero_divisor: Any = {"zero": "zero", "sum": "one"}[cancelled]
        delta = methods.ties(
            tau, weights=case.weights, zero_divisor=zero_divisor, **settled, **chosen
        )
        assert_rounds_to(got, methods.apply_to_base(case.base, delta, case.lam))


@given(case=cases(levels=False))
@CASES
def test_ties_of_random_numbers(case: Case) -> None:
    """Numbers whose sums round give the float64 result within the rounding."""
    for scope, count in TRIMS:
        settled: dict[str, Any] = {"density": case.density, "scope": scope, "count": count}
        delta = methods.ties(case.task_vectors, weights=case.weights, **settled)
        got = case.merged("ties", **settled)
        assert_rounds_to(got, methods.apply_to_base(case.base, delta))


@given(case=cases())
@CASES
def test_presets_of_ties(case: Case) -> None:
    """The presets named after other tools compute what was observed of them."""
    tau, base = case.task_vectors, case.base
    share: dict[str, Any] = {"density": case.density, "weights": case.weights}
    for preset, delta, lam in (
        ("official", methods.ties(tau, **share), 1.0),
        ("mergekit-0.1.5", methods.ties_mergekit(tau, **share), 1.0),
        ("peft-0.21", methods.ties_peft(tau, **share), 1.0),
        ("fusionbench", methods.ties(tau, divisor="none", **share), 0.3),
    ):
        got = case.merged("ties", compat=preset, density=case.density)
        assert_rounds_to(got, methods.apply_to_base(base, delta, lam))
    assert {"official", "mergekit-0.1.5", "peft-0.21", "fusionbench"} == set(METHODS["ties"].compat)


BANDS = list(product(get_args(methods.Scope), ("exact", "at_least_one"), CONFLICTS))


def emptied(case: Case, scope: str, count: str) -> dict[str, list[np.ndarray]]:
    """Task vectors without the scalars that an exact count by row leaves nothing of.

    The oracle keeps scalars whole by row, as the authors do.
    """
    tau = case.task_vectors
    if scope == "row" and count == "exact" and case.density < 1:
        tau["c.scale"] = [np.zeros(()) for _ in case.models]
    return tau


@pytest.mark.parametrize(("scope", "count", "conflict"), BANDS)
@given(data=st.data())
@CASES
def test_every_variant_of_breadcrumbs(
    scope: Any, count: str, conflict: str, data: st.DataObject
) -> None:
    """Every scope, count and conflict: the mask of one model, and the sum of several."""
    case = data.draw(cases())
    gamma = data.draw(st.integers(0, 19)) / 20
    tau = emptied(case, scope, count)
    named: dict[str, Any] = {
        "scope": scope,
        "conflict": CONFLICTS[conflict],
        "at_least_one": count == "at_least_one",
    }
    params: dict[str, Any] = {"density": case.density, "gamma": gamma, "scope": scope}
    params |= {"count": count, "conflict": conflict}
    delta = methods.breadcrumbs(
        tau, density=case.density, gamma=gamma, weights=case.weights, **named
    )
    got = case.merged("breadcrumbs", lam=case.lam, **params)
    assert_rounds_to(got, methods.apply_to_base(case.base, delta, case.lam))
    mask = methods.breadcrumbs_mask(tau, case.density, gamma, **named)[0]
    assert_same_mask(alone("breadcrumbs", tau, lam=1.0, **params), tau, mask)


@pytest.mark.parametrize(("scope", "count", "conflict"), BANDS)
@given(data=st.data())
@CASES
def test_every_variant_of_breadcrumbs_ties(
    scope: Any, count: str, conflict: str, data: st.DataObject
) -> None:
    """The mask of Breadcrumbs under every election and divisor of TIES, and mergekit's preset."""
    case = data.draw(cases(signed=False))
    share: dict[str, Any] = {"density": case.density, "gamma": data.draw(st.integers(0, 19)) / 20}
    tau = emptied(case, scope, count)
    choices: dict[str, list[Any]] = {
        "sign": list(get_args(methods.Sign)),
        "election": list(get_args(methods.Election)),
        "tie": list(get_args(methods.Tie)),
        "divisor": list(get_args(methods.Divisor)),
    }
    settled = {"scope": scope, "count": count, "conflict": conflict, **share}
    outputs = case.merged("breadcrumbs_ties", lam=case.lam, **settled, **choices)
    for values, got in zip(product(*choices.values()), outputs, strict=True):
        chosen: dict[str, Any] = dict(zip(choices, values, strict=True))
        delta = methods.breadcrumbs_ties(
            tau,
            weights=case.weights,
            scope=scope,
            conflict=CONFLICTS[conflict],
            at_least_one=count == "at_least_one",
            **share,
            **chosen,
        )
        assert_rounds_to(got, methods.apply_to_base(case.base, delta, case.lam))
    for normalize, divisor in ((True, "weights"), (False, "none")):
        delta = methods.breadcrumbs_ties_mergekit(
            case.task_vectors, weights=case.weights, normalize=normalize, **share
        )
        got = case.merged("breadcrumbs_ties", compat="mergekit-0.1.5", divisor=divisor, **share)
        assert_rounds_to(got, methods.apply_to_base(case.base, delta))


@given(case=cases(), gamma=st.integers(0, 19))
@CASES
def test_presets_of_breadcrumbs(case: Case, gamma: int) -> None:
    """The presets named after other tools compute what was observed of them."""
    tau = case.task_vectors
    share: dict[str, Any] = {"density": case.density, "gamma": gamma / 20}
    flat = methods.breadcrumbs_mergekit(tau, weights=case.weights, **share)
    got = case.merged("breadcrumbs", compat="mergekit-0.1.5", **share)
    assert_rounds_to(got, methods.apply_to_base(case.base, flat))
    rows = methods.breadcrumbs(emptied(case, "row", "exact"), weights=case.weights, **share)
    got = case.merged("breadcrumbs", compat="official", **share)
    assert_rounds_to(got, methods.apply_to_base(case.base, rows, 0.4))
    assert {"official", "mergekit-0.1.5"} == set(METHODS["breadcrumbs"].compat)
