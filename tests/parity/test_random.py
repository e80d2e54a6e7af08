"""Random methods against what mergekit itself wrote: the same rules, other numbers.

mergekit drops other entries than we do. What can be compared is how what stays is rescaled, which
is exact, and how much stays, which is chance: a share, moments of the sum, and its dependence on
ranks, each within five standard deviations.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import mergebench as mb
from mergebench.merge.ops.magprune import probabilities
from tests.parity.cases import Case, cases
from tests.parity.models import tensors

COMPAT = "mergekit-0.1.5"
CASES = list(cases("random"))
#: One model of weight 1, so that every entry shows what became of it.
ALONE = [case for case in CASES if "-one" in case.name]
RANKED = [case for case in ALONE if "della" in case.name]
#: Five standard deviations, either way.
SPREAD = 5.0
SEEDS = 16

Arrays = dict[str, np.ndarray]


def merged(case: Case, seed: int = 0, **changed: Any) -> Arrays:
    """What mergebench makes of a mergekit configuration."""
    config = case.config
    shared: dict[str, Any] = dict(config.get("parameters", {}))
    own = [dict(model["parameters"]) for model in config["models"]]
    pairs = [
        (tensors(model["model"], case.dtype), parameters.pop("weight"))
        for model, parameters in zip(config["models"], own, strict=True)
    ]
    params: dict[str, Any] = {**own[0], **shared, "seed": seed}
    method = config["merge_method"]
    params["lam"] = params.pop("lambda", 1.0)
    if not params.pop("rescale", True):
        params["rescale"] = "none"
    if "normalize" in params and method in ("dare_ties", "della"):
        params["divisor"] = "weights" if params.pop("normalize") else "none"
    base = tensors("base", case.dtype)
    return mb.merge_models(pairs, base=base, method=method, compat=COMPAT, **{**params, **changed})


@cache
def recorded(case: Case) -> Arrays:
    """What mergekit wrote."""
    return case.recorded()


def displaced(case: Case, outputs: Arrays) -> Arrays:
    """Outputs minus base, in float64."""
    base = tensors("base", case.dtype)
    return {n: a.astype(np.float64) - base[n].astype(np.float64) for n, a in outputs.items()}


def task_vector(case: Case) -> Arrays:
    """The task vector of the first model."""
    return displaced(case, tensors(case.config["models"][0]["model"], case.dtype))


def parameter(case: Case, name: str) -> float:
    """A parameter that all models have alike."""
    return float(case.config["models"][0]["parameters"][name])


def assert_rescaled(case: Case, outputs: Arrays) -> None:
    """What stays of each tensor is its task vector times one factor, that of the L1 norms or 1."""
    norm = case.config.get("parameters", {}).get("rescale", True)
    tau, got = task_vector(case), displaced(case, outputs)
    for name, delta in got.items():
        kept = (delta != 0) & (tau[name] != 0)
        # An entry may stay and yet be rounded away; it must then be small beside its weight.
        left = np.abs(tau[name][kept]).sum()
        factor = np.abs(tau[name]).sum() / left if norm and left else 1.0
        weight = np.abs(tensors("base", case.dtype)[name].astype(np.float64))
        unit = 2.0**-23 if case.dtype == "float32" else 2.0**-7
        bound = unit * (weight + np.abs(delta)) + 1e-5 * np.abs(delta)
        wrong = np.abs(delta - factor * tau[name])[kept] > bound[kept]
        assert not wrong.any(), (name, int(wrong.sum()))


@pytest.mark.parametrize("ours", [False, True], ids=["mergekit", "mergebench"])
@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.label)
def test_what_stays_is_rescaled_alike(case: Case, ours: bool) -> None:
    """Both multiply a tensor by the ratio of its L1 norms, and by nothing if told so."""
    assert_rescaled(case, merged(case) if ours else recorded(case))


def test_another_rescaling_is_noticed() -> None:
    """Division by the density, as the paper has it, is not what mergekit does."""
    case = Case("random/dare-linear-one", "float32")
    with pytest.raises(AssertionError):
        assert_rescaled(case, merged(case, rescale="density"))


def kept_and_chances(case: Case, outputs: Arrays, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of the task vector stayed, and with what probability, over all tensors."""
    tau, got = task_vector(case), displaced(case, outputs)
    density = parameter(case, "density")
    masks, chances = [], []
    for name, delta in got.items():
        rows = np.abs(tau[name]).reshape(-1, tau[name].shape[-1])
        ranks = np.argsort(np.argsort(rows, axis=1), axis=1)
        table = probabilities(rows.shape[1], density, epsilon)
        there = (rows != 0).ravel()
        masks.append((delta != 0).ravel()[there])
        chances.append(table[ranks].ravel()[there])
    return np.concatenate(masks), np.concatenate(chances)


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.label)
def test_as_much_stays(case: Case) -> None:
    """The density is the share that stays, by mergekit and by us."""
    epsilon = parameter(case, "epsilon") if case in RANKED else 0.0
    for outputs in (recorded(case), merged(case), merged(case, seed=1)):
        kept, chances = kept_and_chances(case, outputs, epsilon)
        spread = SPREAD * np.sqrt((chances * (1 - chances)).sum())
        assert abs(kept.sum() - chances.sum()) < spread


def slope(kept: np.ndarray, chances: np.ndarray) -> float:
    """How strongly staying follows the probability, in standard deviations from what it should."""
    centred = chances - chances.mean()
    excess = ((kept - chances) * centred).sum()
    return float(excess / np.sqrt((chances * (1 - chances) * centred**2).sum()))


@pytest.mark.parametrize("case", RANKED, ids=lambda case: case.label)
def test_ranks_decide_alike(case: Case) -> None:
    """Staying depends on the rank in a row as ε says; without that dependence it would show."""
    epsilon = parameter(case, "epsilon")
    for outputs in (recorded(case), merged(case)):
        assert abs(slope(*kept_and_chances(case, outputs, epsilon))) < SPREAD
        for wrong in (epsilon / 2, -epsilon):
            assert abs(slope(*kept_and_chances(case, outputs, wrong))) > 2 * SPREAD


def moments(case: Case, outputs: Arrays) -> np.ndarray:
    """Of a merge beside that without dropping: projection, energy, share of zeros, L1 norm."""
    whole = reference(case)
    got = displaced(case, outputs)
    left = np.concatenate([got[name].ravel() for name in sorted(got)])
    right = np.concatenate([whole[name].ravel() for name in sorted(got)])
    return np.array(
        [
            left @ right / (right @ right),
            left @ left / (right @ right),
            np.mean(left == 0),
            np.abs(left).sum() / np.abs(right).sum(),
        ]
    )


@cache
def reference(case: Case) -> Arrays:
    """The merge without dropping anything."""
    return displaced(case, merged(case, density=1.0))


@cache
def expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of our moments over seeds."""
    runs = np.array([moments(case, merged(case, seed=seed)) for seed in range(SEEDS)])
    return runs.mean(axis=0), runs.std(axis=0, ddof=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_moments_are_alike(case: Case) -> None:
    """Recorded moments lie within five standard deviations of ours."""
    mean, deviation = expected(case)
    found = moments(case, recorded(case))
    assert np.all(np.abs(found - mean) < SPREAD * deviation), (found, mean, deviation)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dare-linear-weighted", {"rescale": "none"}),
        ("dare-linear-normalised", {"normalize": False}),
        ("dare-ties-weighted", {"divisor": "weights"}),
        ("dare-ties-normalised", {"divisor": "none"}),
        ("della-weighted", {"divisor": "none"}),
        ("della-weighted", {"epsilon": 0.0}),
        ("della-linear-weighted", {"density": 0.6}),
    ],
)
def test_other_rules_have_other_moments(name: str, wrong: dict[str, Any]) -> None:
    """A rule that is not mergekit's is told apart."""
    case = Case(f"random/{name}", "float32")
    mean, deviation = expected(case)
    assert np.any(np.abs(moments(case, merged(case, **wrong)) - mean) > SPREAD * deviation)
