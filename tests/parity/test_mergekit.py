"""Our `mergekit-0.1.5` presets against what mergekit itself wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mergebench as mb
from tests.parity.cases import BF16_MATH, Case, cases
from tests.parity.classify import classify
from tests.parity.models import tensors

COMPAT = "mergekit-0.1.5"
#: mergekit computes these in bfloat16; ours are always computed in float32, so that other entries
#: lie at the threshold.
IN_BF16 = [case for case in cases() if case.name.endswith(BF16_MATH)]
COMPARED = [case for case in cases() if case not in IN_BF16]


def merged(case: Case) -> dict[str, np.ndarray]:
    """What mergebench makes of a mergekit configuration."""
    config = case.config
    shared: dict[str, Any] = dict(config.get("parameters", {}))
    own = [dict(model["parameters"]) for model in config["models"]]
    pairs = [
        (tensors(model["model"], case.dtype), parameters.pop("weight"))
        for model, parameters in zip(config["models"], own, strict=True)
    ]
    assert all(parameters == own[0] for parameters in own), "one density for all models"
    params = {**own[0], **shared}
    method = config["merge_method"]
    base = tensors(config["base_model"], case.dtype) if "base_model" in config else None
    if "lambda" in params:
        params["lam"] = params.pop("lambda")
    normalize = params.pop("normalize", True)
    if method == "linear":
        return mb.merge_models(pairs, method=method, compat=COMPAT, normalize=normalize)
    if method == "ties":
        params["divisor"] = "weights" if normalize else "none"
    if method == "breadcrumbs_ties":
        params["divisor"] = "weights" if config.get("parameters", {}).get("normalize") else "none"
    return mb.merge_models(pairs, base=base, method=method, compat=COMPAT, **params)


def assert_explained(case: Case, outputs: dict[str, np.ndarray]) -> None:
    """Every entry equals the oracle's, or differs by rounding or by which tied entry is kept."""
    outcome = classify(case, outputs)
    assert outcome.counts["unexplained"] == 0, outcome
    assert outcome.counts["sign tie"] == 0, outcome
    assert outcome.impossible_ties == 0, outcome
    assert outcome.counts.total() == sum(array.size for array in outputs.values())


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.label)
def test_recordings_follow_the_oracle(case: Case) -> None:
    """What mergekit wrote is the formula of its documentation up to rounding and ties."""
    assert_explained(case, case.recorded())


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.label)
def test_preset_equals_mergekit(case: Case) -> None:
    """Our preset gives the same formula, and the same entries wherever no magnitudes are tied."""
    ours, theirs = merged(case), case.recorded()

    assert_explained(case, ours)
    # Where mergekit had to choose among equal magnitudes it chose freely; we take the earlier.
    ties = classify(case).counts["threshold tie"] + classify(case, ours).counts["threshold tie"]
    apart = 0
    for name, array in theirs.items():
        left, right = ours[name].astype(np.float64), array.astype(np.float64)
        unit = np.spacing(np.abs(right).astype(np.float32)).astype(np.float64)
        unit = unit * 2**16 if case.dtype == "bfloat16" else unit * 2
        apart += int(np.count_nonzero(np.abs(left - right) > np.maximum(unit, 1.5e-7)))
    assert apart <= ties


def test_a_wrong_rule_is_noticed() -> None:
    """The comparison fails where the vote is unweighted, so it can fail."""
    case = Case("ties-weighted-lambda", "float32")
    pairs = [
        (tensors(model["model"]), model["parameters"]["weight"]) for model in case.config["models"]
    ]
    wrong = mb.merge_models(
        pairs,
        base=tensors("base"),
        method="ties",
        compat=COMPAT,
        density=0.5,
        lam=0.7,
        election="unweighted",
    )

    assert classify(case, wrong).counts["unexplained"] > 100
