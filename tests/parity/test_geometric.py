"""Geometric and selective methods against what mergekit itself wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mergebench as mb
from tests.parity.cases import Case, cases
from tests.parity.geometric import FOLDER, Outcome, classify, inputs_of

COMPAT = "mergekit-0.1.5"
CASES = list(cases(FOLDER))


def merged(case: Case, **params: Any) -> dict[str, np.ndarray]:
    """What mergebench makes of a mergekit configuration."""
    given = inputs_of(case)
    wanted = dict(given.params)
    if given.method == "nuslerp" and not wanted.pop("nuslerp_flatten", True):
        wanted["scope"] = "row"
    if given.method == "model_stock" and wanted.pop("filter_wise", False):
        wanted["scope"] = "row"
    if "normalize_weights" in wanted:
        wanted["normalize"] = wanted.pop("normalize_weights")
    wanted |= params
    count = len(given.weights)
    pairs = [
        ({name: each[i] for name, each in given.models.items()}, given.weights[i])
        for i in range(count)
    ]
    return mb.merge_models(pairs, base=given.base, method=given.method, compat=COMPAT, **wanted)


def assert_explained(outcome: Outcome, case: Case, threshold: bool) -> None:
    """Nothing is unexplained, and thresholds explain something only where they may."""
    assert outcome.counts["unexplained"] == 0, (case.label, outcome)
    assert outcome.counts.total() == 6224
    assert threshold or outcome.counts["threshold"] == 0, (case.label, outcome)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_recordings_follow_the_oracle(case: Case) -> None:
    """What mergekit wrote is the reference, up to rounding and what it does to thresholds."""
    assert_explained(classify(case), case, threshold=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_preset_equals_mergekit(case: Case) -> None:
    """Our preset is the same reference; measured in float64, its thresholds are the exact ones."""
    assert_explained(classify(case, merged(case)), case, threshold=False)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("multislerp-weights", {"tangent": "log"}),
        ("model-stock-rows", {"scope": "tensor"}),
        ("nuslerp-rows", {"scope": "tensor"}),
        ("sce-selected", {"select_topk": 0.19}),
        ("sce-all", {"select_topk": 0.99}),
        ("ram-plus", {"r": 0.4}),
        ("ram-plus", {"epsilon": 0.011}),
        ("nearswap-small", {"t": 0.019}),
        ("arcee-fusion", {"iqr": 1.45}),
        ("passthrough-scaled", {"scale": 0.75001}),
    ],
)
def test_a_wrong_rule_is_noticed(name: str, wrong: dict[str, Any]) -> None:
    """The comparison fails on another rule or value, so it can fail."""
    case = Case(f"{FOLDER}/{name}", "float32")
    assert classify(case, merged(case, **wrong)).counts["unexplained"] > 0
