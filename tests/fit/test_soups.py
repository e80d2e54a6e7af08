"""Greedy soups (arXiv:2203.05482)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergebench.core.errors import ParameterError
from mergebench.merge.api import merge_models
from mergebench.merge.fit.soups import greedy_soup
from tests.fit.support import make, recipe_of, save_model, scores_of


def near_one(w: Any) -> dict[str, float]:
    """The scorer of the golden case: -|θ - 1|."""
    return {"near": -float(np.abs(w - 1).max())}


def test_golden(tmp_path: Path) -> None:
    """θ = {0, 2, 5} and -|θ - 1|: 2, the later of equals, starts; 0 joins to 1; 5 is left out."""
    places = [save_model(tmp_path / name, [v]) for name, v in (("a", 0), ("b", 2), ("c", 5))]
    made = greedy_soup(recipe_of(*places), scores_of(near_one), "val", make)
    assert [Path(step.model).name for step in made.steps] == ["b", "a", "c"]
    assert [step.accepted for step in made.steps] == [True, True, False]
    assert [step.alone for step in made.steps] == [-1.0, -1.0, -4.0]
    assert [step.together for step in made.steps[:2]] == [None, 0.0]
    assert made.steps[2].together == pytest.approx(-4 / 3, rel=1e-6)
    assert made.value == 0.0
    assert [Path(ref.path).name for ref in made.recipe.models] == ["b", "a"]
    with make(made.recipe, "soup") as candidate:
        np.testing.assert_array_equal(candidate.arrays()["w"], [1.0])


def test_one_model_is_itself(tmp_path: Path) -> None:
    """A soup of one."""
    place = save_model(tmp_path / "a", [3.0])
    made = greedy_soup(recipe_of(place), scores_of(near_one), "val", make)
    assert (len(made.recipe.models), made.value) == (1, -2.0)


@pytest.mark.parametrize(("accept", "taken"), [(">", 1), (">=", 2)])
def test_equal_scores(tmp_path: Path, accept: Any, taken: int) -> None:
    """A model that changes nothing is taken only where that is enough."""
    places = [save_model(tmp_path / name, [3.0], b) for name, b in (("a", (0, 0)), ("b", (1, 0)))]
    made = greedy_soup(recipe_of(*places), scores_of(near_one), "val", make, accept=accept)
    assert len(made.recipe.models) == taken


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=5),
    target=st.floats(-4, 4, width=16),
)
def test_the_score_never_falls(values: list[float], target: float) -> None:
    """Along the steps, and the soup is no worse than any single model."""
    soups: list[list[float]] = []

    def score(w: Any) -> dict[str, float]:
        return {"near": -float(np.abs(w - target).max())}

    # In memory, as files would take most of the time.
    class Instead:
        def __init__(self, recipe: Any, label: str) -> None:
            picked = [values[int(ref.path)] for ref in recipe.models]
            soups.append(picked)
            self.label, self.key = label, repr([ref.path for ref in recipe.models])
            self.merging = 0.0
            self.models = [{"w": np.array([v], np.float32)} for v in picked]

        def arrays(self) -> Any:
            return merge_models(self.models)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *about: object) -> None:
            pass

    recipe = recipe_of(*(Path(str(place)) for place in range(len(values))))
    made = greedy_soup(recipe, scores_of(score), "val", Instead)  # type: ignore[arg-type]
    best = made.steps[0].alone
    assert best is not None
    assert best == max(step.alone for step in made.steps if step.alone is not None)
    for step in made.steps[1:]:
        if step.accepted:
            assert step.together is not None
            assert step.together > best
            best = step.together
    assert made.value == best


def test_no_score_no_soup(tmp_path: Path) -> None:
    """Models without a score are left out; without any there is nothing to start from."""
    places = [save_model(tmp_path / name, [v]) for name, v in (("a", 0), ("b", 2))]

    def broken_below_one(w: Any) -> dict[str, float]:
        if w[0] < 1:
            raise ValueError("odd")
        return {"near": float(w[0])}

    made = greedy_soup(
        recipe_of(*places), scores_of(broken_below_one, on_error="skip"), "val", make
    )
    assert [Path(ref.path).name for ref in made.recipe.models] == ["b"]
    assert "ValueError: odd" in made.steps[-1].outcomes[0].problem

    def broken(w: Any) -> dict[str, float]:
        raise ValueError("odd")

    with pytest.raises(ParameterError, match="no model has a score"):
        greedy_soup(recipe_of(*places), scores_of(broken, on_error="skip"), "val", make)
