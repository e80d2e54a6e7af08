"""Merges against what FusionBench 0.2.33 has made of the same models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergebench import merge_models
from tests.parity.models import FINE_TUNES, NAMES, digest, tensors
from tests.parity.record_fusionbench import RECORDED

MANIFEST = json.loads((RECORDED / "manifest.json").read_text())
#: Case -> (what to ask mergebench for, largest difference relative to the task vector's largest
#: entry). FusionBench decomposes in float32; its trimming and adding are exact to the rounding.
CASES: Mapping[str, tuple[dict[str, Any], float]] = {
    "task-arithmetic": ({"method": "task_arithmetic", "compat": "fusionbench"}, 1e-5),
    "ties-sum": ({"method": "ties", "compat": "fusionbench"}, 1e-5),
    "ties-mean": ({"method": "ties", "compat": "fusionbench", "divisor": "count"}, 1e-5),
    "tsv-merge": ({"method": "tsv_merge", "compat": "fusionbench-0.2.33"}, 1e-4),
    "iso-c": ({"method": "iso_c", "compat": "fusionbench-0.2.33", "lam": 1.5}, 1e-4),
    "iso-cts": ({"method": "iso_cts", "compat": "fusionbench-0.2.33", "lam": 1.5}, 1e-4),
    "iso-cts-half": ({"method": "iso_cts", "compat": "fusionbench-0.2.33", "common": 0.5}, 1e-4),
    "wudi": ({"method": "wudi", "compat": "fusionbench-0.2.33"}, 1e-4),
    "emr-a": ({"method": "emr", "compat": "fusionbench-0.2.33", "tasks": "models_0"}, 1e-5),
    "emr-b": ({"method": "emr", "compat": "fusionbench-0.2.33", "tasks": "models_1"}, 1e-5),
    # It adds 1e-8 to products of norms, which is felt where a tensor hardly moved.
    "model-stock-two": ({"method": "model_stock", "of": 2}, 5e-4),
    "svc": (
        {"method": "task_arithmetic", "compat": "fusionbench", "then": ["svc:alpha=0.1"]},
        1e-4,
    ),
}


def merged(asked: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What mergebench makes of the recorded models."""
    settings = dict(asked)
    models = [tensors(name) for name in FINE_TUNES[: settings.pop("of", None)]]
    result: dict[str, np.ndarray] = merge_models(models, base=tensors("base"), **settings)
    return result


def distance(got: Mapping[str, np.ndarray], recorded: Mapping[str, np.ndarray]) -> float:
    """The largest difference in a tensor, relative to the largest entry of its task vector."""
    base = tensors("base")
    assert set(got) == set(recorded) == set(base)
    return max(
        float(np.abs(got[name] - array).max() / np.abs(array - base[name]).max())
        for name, array in recorded.items()
    )


def test_the_recorded_models_are_these() -> None:
    """The recorded outputs belong to the models that are built here, and to these cases."""
    assert MANIFEST["models"] == {name: digest(tensors(name)) for name in NAMES}
    assert MANIFEST["cases"] == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_fusionbench_makes_the_same(case: str) -> None:
    """Every tensor is FusionBench's within the tolerance of the case."""
    asked, tolerance = CASES[case]
    assert distance(merged(asked), load_file(RECORDED / f"{case}.safetensors")) <= tolerance


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("ties-sum", {"count": "exact", "density": 0.25}),
        ("ties-mean", {"divisor": "none"}),
        ("tsv-merge", {"keep": "all"}),
        ("tsv-merge", {"orthogonalize": False}),
        ("iso-c", {"lam": 1.0}),
        ("iso-cts", {"common": 0.5}),
        ("wudi", {"steps": 200}),
        ("emr-a", {"over": "entries"}),
        ("emr-b", {"tasks": "models_0"}),
        ("model-stock-two", {"scope": "row"}),
        ("model-stock-two", {"of": 3}),
        ("wudi", {"solver": "exact"}),
        ("svc", {"then": ["svc:alpha=1"]}),
        ("svc", {"then": []}),
    ],
)
def test_another_formula_would_show(case: str, wrong: dict[str, Any]) -> None:
    """A parameter that changes the formula is far outside of the tolerance."""
    asked, tolerance = CASES[case]
    recorded = load_file(RECORDED / f"{case}.safetensors")
    assert distance(merged({**asked, **wrong}), recorded) > 10 * tolerance
