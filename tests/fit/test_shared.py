"""Measured values that candidates share: the same bytes as without, and measured once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mergebench.merge import stream
from mergebench.merge.fit.candidate import Candidate
from mergebench.merge.planning import make_plan
from mergebench.merge.resume import decides
from mergebench.merge.shared import Measured, Shared
from mergebench.recipe import ModelRef, OpRef, Recipe
from tests.helpers.files import read, write

NAMES = ("u0.weight", "u1.weight", "c.bias")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Two models and their base."""
    random = np.random.default_rng(0)
    shapes = {"u0.weight": (40, 30), "u1.weight": (17, 9), "c.bias": (5,)}
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    write(tmp_path / "base.safetensors", base)
    for name in ("one", "two"):
        tuned = {n: v + 0.1 * random.standard_normal(v.shape, np.float32) for n, v in base.items()}
        write(tmp_path / f"{name}.safetensors", tuned)
    models = tuple(ModelRef(str(tmp_path / f"{name}.safetensors")) for name in ("one", "two"))
    return Recipe(models, "ties", {"lam": 0.3}, base=str(tmp_path / "base.safetensors"))


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been measured, one entry for each sweep over a tensor or a model."""
    seen: list[str] = []
    found = stream.Evaluator._sweep

    def counted(self: stream.Evaluator, scope: object, alone: object) -> object:
        seen.append("sweep")
        return found(self, scope, alone)

    monkeypatch.setattr(stream.Evaluator, "_sweep", counted)
    return seen


def arrays(recipe: Recipe, shared: Shared | None) -> dict[str, np.ndarray]:
    """A candidate's values, copied."""
    with Candidate(recipe, "x", shared=shared) as candidate:
        return {name: array.copy() for name, array in candidate.arrays().items()}


def assert_as_alone(recipe: Recipe, shared: Shared) -> None:
    """Every byte is that of a candidate by itself."""
    found, alone = arrays(recipe, shared), arrays(recipe, None)
    assert sorted(found) == sorted(alone) == sorted(NAMES)
    for name, array in found.items():
        assert array.tobytes() == alone[name].tobytes(), name


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_grid_over_lambda_measures_once(recipe: Recipe, scope: str, sweeps: list[str]) -> None:
    """Thresholds and elected signs are those of the first candidate, and so are all bytes."""
    shared = Shared()
    arrays(replace(recipe, params={"lam": 0.1, "scope": scope}), shared)
    first = len(sweeps)
    assert first > 0

    for lam in (0.1, 0.4, 1.0):
        arrays(replace(recipe, params={"lam": lam, "scope": scope}), shared)
    assert len(sweeps) == first

    for lam in (0.4, 1.0):
        assert_as_alone(replace(recipe, params={"lam": lam, "scope": scope}), shared)


def test_other_thresholds_are_measured(recipe: Recipe, sweeps: list[str]) -> None:
    """Of another density; and a method that trims alike has them already."""
    shared = Shared()
    for density in (0.2, 0.5):
        before = len(sweeps)
        arrays(replace(recipe, params={"density": density}), shared)
        assert len(sweeps) > before
    assert_as_alone(replace(recipe, params={"density": 0.5}), shared)
    before = len(sweeps)
    arrays(replace(recipe, params={"density": 0.2}, then=(OpRef("scale", {"lam": 2.0}),)), shared)
    assert len(sweeps) == before


def test_what_is_seen_of_the_inputs_decides(recipe: Recipe, tmp_path: Path) -> None:
    """Another base, selection, weight or model: nothing of the first is taken for it."""
    random = np.random.default_rng(1)
    base = read(tmp_path / "base.safetensors")
    moved = {n: v + 0.05 * random.standard_normal(v.shape, np.float32) for n, v in base.items()}
    write(tmp_path / "other.safetensors", moved)
    other = str(tmp_path / "other.safetensors")
    one, two = recipe.models
    shared = Shared()
    asked = [
        recipe,
        replace(recipe, base=other),
        replace(recipe, include=("u0",)),
        replace(recipe, models=(replace(one, weight=3.0), two)),
        replace(recipe, models=(two, one)),
        replace(recipe, models=(one, ModelRef(other))),
        replace(recipe, models=(one, two, ModelRef(other))),
        replace(recipe, method="model_stock", params={}),
        replace(recipe, method="slerp", params={}),
        replace(recipe, method="slerp", params={}, base=None),
        replace(recipe, method="karcher", params={}, base=None),
        replace(recipe, method="lines", params={"alpha": "norms"}),
        replace(recipe, method="dare", params={"rescale": "l1"}),
        replace(recipe, method="", params={}, ops=(OpRef("trim", {"density": 0.5}), OpRef("sum"))),
    ]
    for each in [*asked, *reversed(asked)]:
        assert_as_alone(each, shared)


@pytest.mark.parametrize("changed", ["one", "base"])
def test_a_changed_file_is_measured_again(recipe: Recipe, tmp_path: Path, changed: str) -> None:
    """Inputs are known by their files, as for going on with a merge."""
    shared = Shared()
    arrays(recipe, shared)
    place = tmp_path / f"{changed}.safetensors"
    write(place, {name: values * np.float32(1.5) for name, values in read(place).items()})

    assert_as_alone(recipe, shared)


def test_plans_that_see_other_entries_share_nothing(recipe: Recipe) -> None:
    """Weights or displacements, other blocks: told apart before anything is measured."""
    shared = Shared()
    plain = replace(recipe, method="slerp", params={})
    asked = [
        plain,
        replace(plain, method="", ops=(OpRef("slerp"),)),
        replace(plain, block_pattern=r"(?P<stack>u)(?P<index>\d+)\."),
        replace(plain, allow_nonfinite=True),
    ]
    plans = [make_plan(replace(each, form="model")) for each in asked]
    for number, plan in enumerate(plans):
        found = shared.of(plan, decides(plan, plan.variants[0]))
        assert ((), "x") not in found, number
        found.add(((), "x"), number)
    for number, plan in enumerate(plans):
        assert shared.of(plan, decides(plan, plan.variants[0]))[(), "x"] == number


def test_folders_share_too(recipe: Recipe, sweeps: list[str]) -> None:
    """A scorer that asks for a folder gets the same bytes, and nothing is measured for it."""
    shared = Shared()
    arrays(recipe, shared)
    before = len(sweeps)

    with Candidate(recipe, "x", shared=shared) as candidate:
        written = read(next(candidate.folder().glob("*.safetensors")))

    assert len(sweeps) == before
    for name, array in arrays(recipe, None).items():
        assert written[name].tobytes() == array.tobytes()


def test_room(recipe: Recipe, sweeps: list[str]) -> None:
    """What finds no room is measured again, with the same result."""
    shared, counts = Shared(room=0), []
    for each in (None, shared, shared):
        before = len(sweeps)
        arrays(recipe, each)
        counts.append(len(sweeps) - before)
    assert counts[0] == counts[1] == counts[2] > 0

    plan = make_plan(recipe)
    some = Shared(room=1000)
    kept: Measured = some.of(plan, decides(plan, plan.variants[0]))
    kept.add(((), "small"), [1.0, np.zeros(4)])
    kept.add(((), "large"), np.zeros(1000))
    kept.add(((), "unknown"), object())
    assert ((), "small") in kept
    assert ((), "large") not in kept
    assert ((), "unknown") not in kept
    assert 0 < some.room < 1000
