"""PCB-Merging against its equations, and what it gives where that is known."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergebench import merge_models
from tests.oracle import competing, methods
from tests.oracle.test_against_oracle import CASES, cases
from tests.oracle.test_drawn import Run

VARIANTS = list(product(("code", "paper"), (True, False)))


@pytest.mark.parametrize(("variant", "normalize"), VARIANTS)
@given(data=st.data())
@CASES
def test_every_variant(variant: str, normalize: bool, data: st.DataObject) -> None:
    """Both formulas, with and without division, on random numbers and any share."""
    case = data.draw(cases(levels=False, signed=True))
    params: dict[str, Any] = {
        "ratio": data.draw(st.sampled_from([0.05, 0.1, 0.35, 0.5, 1.0])),
        "clip": data.draw(st.sampled_from([0.0, 0.0001, 0.01, 0.1])),
        "variant": variant,
        "normalize": normalize,
    }
    run = Run(case, "pcb", lam=case.lam, **params)
    merged = competing.pcb(run.tau, run.case.weights, **params)
    # A score just above the bar has few digits left; float32 holds what it weighs all the same.
    for name, exact in methods.apply_to_base(run.case.base, merged, case.lam).items():
        bound = 1e-5 * max(np.abs(exact).max(initial=0.0), 1.0)
        assert np.abs(run.got[name] - exact).max(initial=0.0) <= bound, name


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
def test_equal_tasks_give_that_task(variant: str, ratio: float) -> None:
    """Three equal tasks merge to that task, times λ, on the share of entries that counts."""
    random = np.random.default_rng(0)
    tau = {"b": random.normal(size=(30, 20)), "a": random.normal(size=400)}
    model = {name: array.astype(np.float32) for name, array in tau.items()}
    base = {name: np.zeros_like(array) for name, array in model.items()}
    got = merge_models(
        [model] * 3, base=base, method="pcb", variant=variant, ratio=ratio, clip=0.0, lam=2.0
    )
    flat = np.concatenate([got[name].ravel() for name in "ab"])
    whole = np.concatenate([model[name].ravel() for name in "ab"])
    kept = flat != 0
    # The lowest score that counts is normalised to zero by the code, and kept by the paper.
    assert int(kept.sum()) == int(ratio * 1000) - (variant == "code")
    assert np.allclose(flat[kept], 2 * whole[kept], rtol=1e-6)
    assert np.abs(whole[kept]).min() >= np.abs(whole[~kept]).max(initial=0.0)


def test_scores_prefer_what_agrees() -> None:
    """Where two tasks agree and a third does not, the third has no say."""
    one, other = [4.0, 1.0, 0.0, 0.5], [3.0, -1.0, 0.0, 0.25]
    against = [-2.0, 0.5, 0.0, 0.125]
    tables = [{"w": np.array(each, np.float32)} for each in (one, other, against)]
    base = {"w": np.zeros(4, np.float32)}
    got = merge_models(tables, base=base, method="pcb", ratio=0.5, clip=0.0)["w"]
    assert 3 <= got[0] <= 4
    assert got[2] == 0


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_nothing_to_compete_for(variant: str) -> None:
    """Task vectors of zeros, and of no entries, give the base, without NaN."""
    zero = {"a": np.zeros(5, np.float32), "b": np.zeros((0, 3), np.float32)}
    base = {"a": np.arange(5, dtype=np.float32), "b": zero["b"]}
    got = merge_models([base, base], base=base, method="pcb", variant=variant)
    assert got["a"].tolist() == base["a"].tolist()
    got = merge_models([zero, zero], base=zero, method="pcb", variant=variant)
    assert got["a"].tolist() == [0.0] * 5
