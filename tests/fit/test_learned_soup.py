"""Learned soups (arXiv:2203.05482): weights that add up to one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench.core.errors import ParameterError
from mergebench.merge.fit.learn import learn
from mergebench.merge.fit.learned_soup import SETTINGS, differences, soup_of_weights
from mergebench.merge.fit.mixture import Mixture, load_mixture
from mergebench.recipe import Recipe
from tests.fit.lines import DIRECTIONS, lines
from tests.fit.support import make, recipe_of, save_model
from tests.helpers.adapters import factors, product, save_peft
from tests.helpers.models import base_model, save_folder

PLACES = {
    "good": (3 * DIRECTIONS["right"], (0.3, 0.0)),
    "poor": (-DIRECTIONS["right"], (0.0, 0.0)),
    "far": (4 * DIRECTIONS["up"], (0.0, 0.5)),
}


@pytest.fixture
def soup(tmp_path: Path) -> tuple[Mixture, Recipe]:
    """Three models without a base."""
    recipe = recipe_of(*(save_model(tmp_path / n, *each) for n, each in PLACES.items()))
    made = differences(recipe)
    assert made.base == recipe.models[0].path
    return load_mixture(make(made, "x").plan, torch.float32), recipe


def weights_of(recipe: Recipe, tensor: str) -> dict[str, float]:
    """Model -> weight at a tensor."""
    return {
        Path(ref.path).name: ref.weight
        if isinstance(ref.weight, float)
        else dict(ref.weight.pairs).get(tensor, ref.weight.otherwise)
        for ref in recipe.models
    }


@pytest.mark.parametrize("by", ["model", "layer"])
def test_what_comes_of_it(soup: Any, by: str) -> None:
    """Weights are positive, add up to one, prefer the better model; the recipe is that soup."""
    mixture, _ = soup
    settings = replace(SETTINGS[by], epochs=40)
    learned = learn(mixture, [lines()], settings, "val")
    recipe = soup_of_weights(mixture, learned.coefficients, None, shared=settings.shared)
    assert (recipe.method, recipe.base) == ("linear", None)
    with make(recipe, "soup") as candidate:
        arrays = candidate.arrays()
    for place, tensor in enumerate(("w", "b")):
        weights = weights_of(recipe, tensor)
        assert sum(weights.values()) == pytest.approx(1.0, abs=1e-6)
        assert min(weights.values()) > 0
        if tensor == "w" or by == "model":
            assert weights["good"] > 0.5 > weights["poor"]
        wanted = sum(weights[name] * np.asarray(PLACES[name][place]) for name in weights)
        np.testing.assert_allclose(arrays[tensor], wanted, rtol=1e-5, atol=1e-6)
    if by == "model":
        assert weights_of(recipe, "w") == weights_of(recipe, "b")
    else:
        assert weights_of(recipe, "w") != weights_of(recipe, "b")
    assert learned.history[-1] < learned.history[0]


def test_published_settings() -> None:
    """AdamW at 0.05 without decay, 5 epochs, a factor of logits, from equal weights."""
    for each in SETTINGS.values():
        assert (each.rate, each.decay, each.epochs, each.start) == (0.05, 0.0, 5, 1.0)
        assert each.softmax
        assert each.temperature
        assert each.objective == "labels"
    assert [each.shared for each in SETTINGS.values()] == [True, False]


@pytest.mark.parametrize("by", ["model", "layer"])
def test_descent_is_that_of_the_softmax(soup: Any, by: str) -> None:
    """Five steps by hand, by autograd through softmax, soup, classifier and factor."""
    mixture, _ = soup
    settings = replace(SETTINGS[by], epochs=5)
    task = lines(count=8)
    learned = learn(mixture, [task], settings, "val")
    rows = [Path(each.label).name for each in mixture.plan.models]
    ws = torch.stack([torch.tensor(PLACES[n][0], dtype=torch.float32) for n in rows])
    bs = torch.stack([torch.tensor(PLACES[n][1], dtype=torch.float32) for n in rows])
    logits = torch.ones(3, 1 if by == "model" else 2, requires_grad=True)
    heat = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.AdamW([logits, heat], lr=0.05, weight_decay=0.0)
    column = {name: place for place, name in enumerate(mixture.names)}
    (batch,) = task.scorer.batches("val")
    for _ in range(5):
        shares = torch.softmax(logits, 0).expand(-1, 2)
        w = torch.einsum("i,ijk->jk", shares[:, column["w"]], ws)
        b = torch.einsum("i,ij->j", shares[:, column["b"]], bs)
        loss = torch.nn.functional.cross_entropy(heat * (batch["x"] @ w.T + b), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wanted = torch.softmax(logits, 0).expand(-1, 2).detach()
    torch.testing.assert_close(learned.coefficients, wanted, rtol=1e-4, atol=1e-5)
    assert learned.heat == pytest.approx(heat.tolist(), rel=1e-4)
    assert learned.heat != (1.0,)


def test_several_tasks(soup: Any) -> None:
    """Losses add up, and each task has a factor of its own."""
    mixture, _ = soup
    tasks = [lines("a"), lines("b", seed=1)]
    learned = learn(mixture, tasks, replace(SETTINGS["model"], epochs=3), "val")
    assert len(learned.heat) == 2
    assert learned.heat[0] != learned.heat[1]


def test_tasks_without_classes(soup: Any) -> None:
    """Are learned by their own loss; there is no factor to be learned."""
    mixture, _ = soup
    task = lines()
    rows = [(batch["x"], batch["labels"] * 1.0) for batch in task.scorer.batches("val")]

    class Regression:
        score, module = task.scorer.score, task.scorer.module

        def batches(self, split: str) -> Any:
            return rows

        def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            return ((outputs[:, 0] - batch[1]) ** 2).mean()

    settings = replace(SETTINGS["model"], epochs=3)
    learned = learn(mixture, [replace(task, scorer=Regression())], settings, "val")
    assert learned.heat == (1.0,)
    assert learned.history[-1] < learned.history[0]


def test_adapters(tmp_path: Path) -> None:
    """On a base: the base and the weighted mean of their updates."""
    base = base_model()
    under = save_folder(tmp_path / "base", base)
    made = [factors(seed, rank=2) for seed in (5, 6)]
    places = [save_peft(tmp_path / f"lora{i}", each) for i, each in enumerate(made)]
    mixture = load_mixture(make(differences(recipe_of(*places, base=str(under))), "x").plan)
    weights = torch.tensor([[0.25], [0.75]]).expand(-1, mixture.columns)
    recipe = soup_of_weights(mixture, weights, str(under), shared=True)
    with make(recipe, "soup") as candidate:
        arrays = candidate.arrays()
    rows = [int(Path(each.label).name[-1]) for each in mixture.plan.models]
    for name in mixture.names:
        wanted = base[name].astype(np.float64)
        for row, number in enumerate(rows):
            wanted = wanted + float(weights[row, 0]) * product(made[number], 4.0)[name]
        np.testing.assert_allclose(arrays[name], wanted, rtol=1e-5, atol=1e-6)


def test_a_single_model(tmp_path: Path) -> None:
    """There is nothing to learn between models: the plan says that nothing is moved."""
    recipe = recipe_of(save_model(tmp_path / "a", *PLACES["good"]))
    with pytest.raises(ParameterError, match="no model moves any tensor"):
        load_mixture(make(differences(recipe), "x").plan)
