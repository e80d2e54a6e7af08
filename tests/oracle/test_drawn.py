"""Random, depth-scaled and consensus merges against their equations in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergebench.core.tensor import ArrayTensor
from mergebench.merge.align import draw_keys
from mergebench.merge.engine import execute_in_memory
from mergebench.merge.method import METHODS
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from mergebench.sources import source_of_arrays
from mergebench.steps import OpRef
from tests.oracle import drawn, methods
from tests.oracle.test_against_oracle import CASES, Case, assert_rounds_to, cases


class Run:
    """A merge, the task vectors in the order in which it adds them up, and their keys."""

    def __init__(self, case: Case, method: str, then: tuple[OpRef, ...] = (), **params: Any):
        labels = [f"models[{i}]" for i in range(len(case.models))]
        *opened, base = (
            source_of_arrays(label, {name: ArrayTensor(array) for name, array in each.items()})
            for label, each in zip([*labels, "base"], [*case.models, case.base], strict=True)
        )
        refs = tuple(map(ModelRef, labels, case.weights))
        recipe = Recipe(models=refs, method=method, params=params, then=then, base="base")
        plan = make_plan(recipe, sources=opened, base=base, workers=1)
        order = [int(model.label.strip("models[]")) for model in plan.models]
        self.case = replace(
            case,
            models=[case.models[i] for i in order],
            weights=tuple(case.weights[i] for i in order),
        )
        self.tau = self.case.task_vectors
        self.keys = draw_keys(plan.models)
        (self.got,) = execute_in_memory(plan)

    def assert_is(self, merged: methods.Tensors, lam: float = 1.0) -> None:
        """The merge is the base plus λ times a merged task vector, but for its rounding."""
        assert_rounds_to(self.got, methods.apply_to_base(self.case.base, merged, lam))


SEEDS = st.integers(0, 2**32 - 1)
RANKED = ("della", "della_linear")


def left_over(data: st.DataObject, method: str, run: Any, rescale: str) -> tuple[Any, ...]:
    """A run of a random method with drawn parameters, and what the oracle leaves of its input."""
    density, seed = data.draw(st.integers(1, 20)) / 20, data.draw(SEEDS)
    params: dict[str, Any] = {"density": density, "seed": seed, "rescale": rescale}
    epsilon = 0.0
    if method in RANKED:
        epsilon = data.draw(st.sampled_from([0.0, 0.4, 0.99])) * min(density, 1 - density)
        params["epsilon"] = epsilon
    found = run(**params)
    if density == 1:
        return found, found.tau
    rule = (
        drawn.ranked_rule(density, epsilon, seed, found.keys)
        if method in RANKED
        else drawn.uniform_rule(density, seed, found.keys)
    )
    return found, drawn.thinned(found.tau, rule, rescale)


def rescales(method: str) -> list[str]:
    """Every way of a method to rescale."""
    return list(METHODS[method].params["rescale"].choices)


LINEAR = ("dare", "dare_linear", "della_linear")


@pytest.mark.parametrize(("method", "rescale"), [(m, r) for m in LINEAR for r in rescales(m)])
@given(data=st.data())
@CASES
def test_random_sums(method: str, rescale: str, data: st.DataObject) -> None:
    """Each entry is kept where the documented number says so, rescaled, and added or averaged."""
    case = data.draw(cases(levels=data.draw(st.booleans()), signed=False))
    options: dict[str, Any] = {"lam": case.lam}
    averages = method != "dare" and data.draw(st.booleans())
    if averages:
        options["normalize"] = True
    run, left = left_over(
        data, method, lambda **params: Run(case, method, **params, **options), rescale
    )
    total = methods.linear(left, run.case.weights, normalize=averages)
    run.assert_is(total, case.lam)


@pytest.mark.parametrize(
    ("method", "rescale"), [(m, r) for m in ("dare_ties", "della") for r in rescales(m)]
)
@given(data=st.data())
@CASES
def test_random_elections(method: str, rescale: str, data: st.DataObject) -> None:
    """What is kept elects and is fused as in TIES, whatever the rule."""
    # Numbers in general position: a vote that cancels but for rounding has no sign to compare.
    case = data.draw(cases(levels=False, signed=False))
    options: dict[str, Any] = {
        "sign": data.draw(st.sampled_from(get_args(methods.Sign))),
        "election": data.draw(st.sampled_from(get_args(methods.Election))),
        "tie": data.draw(st.sampled_from(get_args(methods.Tie))),
        "divisor": data.draw(st.sampled_from(get_args(methods.Divisor))),
    }
    run, left = left_over(
        data,
        method,
        lambda **params: Run(case, method, lam=case.lam, **params, **options),
        rescale,
    )
    merged = methods.ties(left, density=1.0, count="exact", weights=run.case.weights, **options)
    run.assert_is(merged, case.lam)


@given(data=st.data())
@CASES
def test_magnitude_pruning(data: st.DataObject) -> None:
    """The largest entries of each scope are added up."""
    case = data.draw(cases())
    for scope, count in product(get_args(methods.Scope), ("exact", "at_least_one")):
        run = Run(
            case, "magnitude_prune", density=case.density, scope=scope, count=count, lam=case.lam
        )
        merged = methods.breadcrumbs(
            run.tau,
            density=case.density,
            gamma=0.0,
            weights=run.case.weights,
            scope=scope,
            at_least_one=count == "at_least_one",
        )
        if scope == "row" and count == "exact" and case.density < 1:
            # The oracle of Breadcrumbs keeps scalars whole.
            merged["c.scale"] = np.zeros(())
        run.assert_is(merged, case.lam)


def in_layers(case: Case) -> Case:
    """The same tensors in blocks of an encoder and a decoder, and outside of them."""
    names = {
        "b.weight": "decoder.layers.0.weight",
        "a.bias": "decoder.layers.2.bias",
        "B.weight": "decoder.layers.1.weight",
        "c.scale": "encoder.layers.0.scale",
        "a.conv": "embed.conv",
    }

    def renamed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {names[name]: array for name, array in arrays.items()}

    return replace(case, base=renamed(case.base), models=[renamed(each) for each in case.models])


@pytest.mark.parametrize("alpha", ["norms", "rest", "0.25", "-1e-1"])
@given(data=st.data())
@CASES
def test_lines_of_sums(alpha: str, data: st.DataObject) -> None:
    """Every layer is scaled by its depth in its own stack, α by norms, by β or as given."""
    case = in_layers(data.draw(cases(levels=data.draw(st.booleans()))))
    beta = data.draw(st.integers(-4, 8)) / 4
    run = Run(case, "lines", beta=beta, alpha=alpha, lam=case.lam)
    total = methods.task_arithmetic(run.tau, run.case.weights)
    words: dict[str, float | None] = {"norms": None, "rest": 1 - beta}
    first = words[alpha] if alpha in words else float(alpha)
    run.assert_is(drawn.lines(run.tau, total, beta, first), case.lam)


@given(data=st.data())
@CASES
def test_lines_after_ties(data: st.DataObject) -> None:
    """After TIES the norms are those of its result and of the sum of untrimmed task vectors."""
    case = in_layers(data.draw(cases()))
    then = (OpRef("lines", {"beta": 0.75}),)
    run = Run(case, "ties", then, density=case.density, divisor="none")
    merged = methods.ties(
        run.tau, density=case.density, count="exact", weights=run.case.weights, divisor="none"
    )
    run.assert_is(drawn.lines(run.tau, merged, 0.75, None))


@given(data=st.data())
@CASES
def test_consensus(data: st.DataObject) -> None:
    """Entries stay where enough tasks use them, after a sum and after TIES."""
    case = data.draw(cases(levels=data.draw(st.booleans())))
    k, mask_lam = data.draw(st.integers(0, 4)), data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    run = Run(case, "consensus_ta", k=k, mask_lam=mask_lam, lam=case.lam)
    total = methods.task_arithmetic(run.tau, run.case.weights)
    run.assert_is(drawn.consensus(run.tau, total, k, mask_lam), case.lam)
    then = (OpRef("consensus", {"k": k, "mask_lam": mask_lam}),)
    run = Run(case, "ties", then, density=case.density, divisor="none")
    merged = methods.ties(
        run.tau, density=case.density, count="exact", weights=run.case.weights, divisor="none"
    )
    run.assert_is(drawn.consensus(run.tau, merged, k, mask_lam))
