"""Mixtures of task vectors, and descent on their coefficients (METHODS of aTLAS, AdaMerging)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.merge.api import merge_models
from mergebench.merge.fit.adamerging import SETTINGS as ADAMERGING
from mergebench.merge.fit.atlas import SETTINGS as ATLAS
from mergebench.merge.fit.find import Setting, parse_task
from mergebench.merge.fit.learn import Settings, learn
from mergebench.merge.fit.mixture import Factored, Mixture, Whole, load_mixture
from tests.fit.support import F32, make, recipe_of, save_model, task_file
from tests.helpers.adapters import factors, product, save_peft
from tests.helpers.models import base_model, fine_tune, save_folder

BASE_W = np.array([[1.0, 2.0], [3.0, 4.0]], F32)
ONE = np.array([[1.0, 0.0], [0.0, 0.0]], F32)
TWO = np.array([[0.0, 0.5], [-0.5, 0.0]], F32)


def two_vectors(folder: Path) -> Mixture:
    """W moves along two directions; b along one."""
    base = save_model(folder / "base", BASE_W)
    one = save_model(folder / "one", BASE_W + ONE, (1.0, 0.0))
    two = save_model(folder / "two", BASE_W + TWO)
    return mixture_of(one, two, base=base)


def mixture_of(*places: Path, base: Path, dtype: Any = torch.float32) -> Mixture:
    """The mixture of models on a base."""
    recipe = recipe_of(*places, base=str(base), method="task_arithmetic", params={"lam": 1.0})
    return load_mixture(make(recipe, "mixture").plan, dtype)


def row_of(mixture: Mixture, name: str) -> int:
    """Which row of coefficients is that of a model, by its folder."""
    return [Path(each.label).name for each in mixture.plan.models].index(name)


def test_ends(tmp_path: Path) -> None:
    """Coefficients of 0 give the base; of 1, task arithmetic at λ = 1, whatever the dtype held."""
    base = base_model()
    places = [save_folder(tmp_path / f"ft{i}", fine_tune(base, i)) for i in (1, 2)]
    under = save_folder(tmp_path / "base", base)
    mixture = mixture_of(*places, base=under)
    shape = (2, len(mixture.names))
    for name, value in mixture.values(torch.zeros(shape)).items():
        np.testing.assert_array_equal(value.numpy(), base[name])
    added = merge_models(list(map(str, places)), base=str(under), method="task_arithmetic", lam=1)
    for name, value in mixture.values(torch.ones(shape)).items():
        np.testing.assert_allclose(value.numpy(), added[name], rtol=1e-6, atol=1e-6)
    half = mixture_of(*places, base=under, dtype=torch.float16)
    for name, value in half.values(torch.ones(shape)).items():
        np.testing.assert_allclose(value.numpy(), added[name], rtol=2e-3, atol=2e-3)


def test_gradients_are_inner_products(tmp_path: Path) -> None:
    """⟨∂L/∂θ, τ⟩ is what differentiating through θ0 + Σ c τ gives."""
    mixture = two_vectors(tmp_path)
    learned = torch.tensor([[0.3, -0.2], [0.7, 0.4]], requires_grad=True)
    through = {}
    for column, (name, base) in enumerate(mixture.base.items()):
        through[name] = base.clone()
        for row, vectors in enumerate(mixture.vectors):
            if name in vectors:
                held = vectors[name]
                assert isinstance(held, Whole)
                through[name] = through[name] + learned[row, column] * held.values
    sum(torch.sin(value).sum() + (value**3).sum() for value in through.values()).backward()
    values = mixture.values(learned.detach())
    for name, value in through.items():
        torch.testing.assert_close(values[name], value.detach())
    at = {name: torch.cos(value) + 3 * value**2 for name, value in values.items()}
    torch.testing.assert_close(mixture.gradient(at), learned.grad)


def test_adapters_stay_factored(tmp_path: Path) -> None:
    """Values and gradients of low-rank updates equal those of their products."""
    base = base_model()
    under = save_folder(tmp_path / "base", base)
    made = factors(5, rank=2)
    place = save_peft(tmp_path / "lora", made)
    mixture = mixture_of(place, base=under)
    wanted = product(made, 2.0)
    assert set(mixture.names) == set(wanted)
    values = mixture.values(torch.full((1, len(mixture.names)), 0.5))
    merged = merge_models([f"{place}:0.5"], base=str(under), method="task_arithmetic", lam=1)
    at = {n: torch.randn(v.shape, generator=torch.Generator().manual_seed(3))
          for n, v in values.items()}  # fmt: skip
    gradient = mixture.gradient(at)
    scale = {n: merged[n] - base[n] for n in mixture.names}
    for column, name in enumerate(mixture.names):
        assert isinstance(mixture.vectors[0][name], Factored)
        np.testing.assert_allclose(values[name].numpy(), merged[name], rtol=1e-5, atol=1e-6)
        expected = 2 * float((at[name].numpy().astype(np.float64) * scale[name]).sum())
        assert float(gradient[0, column]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_an_exact_combination_is_found(tmp_path: Path) -> None:
    """On a quadratic whose minimum is a mixture, the coefficients of that mixture."""
    mixture = two_vectors(tmp_path)
    target = BASE_W + 0.75 * ONE - 1.5 * TWO
    task = parse_task(str(task_file(tmp_path / "near.py", target.tolist())), Setting())
    settings = replace(ATLAS["addition"], epochs=600, rate=0.02, decay=0.0)
    learned = learn(mixture, [task], settings, "val")
    w, b = mixture.names.index("w"), mixture.names.index("b")
    one, two = row_of(mixture, "one"), row_of(mixture, "two")
    assert float(learned.coefficients[one, w]) == pytest.approx(0.75, abs=1e-3)
    assert float(learned.coefficients[two, w]) == pytest.approx(-1.5, abs=1e-3)
    assert float(learned.coefficients[one, b]) == pytest.approx(0.0, abs=1e-3)
    assert learned.history[-1] < 1e-5 < learned.history[0]


def test_the_recipe_merges_to_the_same(tmp_path: Path) -> None:
    """What is written is what was learned, whichever order the models were given in."""
    mixture = two_vectors(tmp_path)
    learned = torch.tensor([[0.25, -0.5], [1.5, 0.75]])
    recipe = mixture.recipe(learned)
    with make(recipe, "result") as candidate:
        arrays = candidate.arrays()
    for name, value in mixture.values(learned).items():
        np.testing.assert_allclose(arrays[name], value.numpy(), rtol=1e-6)


def test_one_coefficient_per_model(tmp_path: Path) -> None:
    """Shared coefficients get the sum of the gradients of their tensors."""
    mixture = two_vectors(tmp_path)
    task = parse_task(str(task_file(tmp_path / "near.py", (BASE_W + ONE).tolist())), Setting())
    learned = learn(mixture, [task], Settings(epochs=400, rate=0.02, decay=0.0, shared=True), "val")
    one = learned.coefficients[row_of(mixture, "one")]
    assert float(one[0]) == float(one[1])
    # (c - 1)² + c² is least at 0.5: b, which the first model moves by 1, should stay.
    assert float(one[0]) == pytest.approx(0.5, abs=1e-3)


def test_entropy_falls_from_task_arithmetic(tmp_path: Path) -> None:
    """AdaMerging starts at 0.3, stays within [0, 1] and needs no labels."""
    mixture = two_vectors(tmp_path)
    task = parse_task(str(task_file(tmp_path / "near.py", BASE_W.tolist())), Setting())
    seen = []
    original = mixture.each_value

    class Watched(Mixture):
        def each_value(self, coefficients: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
            seen.append(coefficients.clone())
            return original(coefficients)

    watched = Watched(mixture.plan, mixture.base, mixture.vectors)
    settings = replace(ADAMERGING["tensor"], steps=50, rate=0.05)
    learned = learn(watched, [task], settings, "val")
    assert bool((seen[0] == 0.3).all())
    assert learned.history[-1] < learned.history[0]
    assert all(float(each.min()) >= 0 and float(each.max()) <= 1 for each in seen)
    assert float(learned.coefficients.max()) == 1.0


def test_signs_and_norms(tmp_path: Path) -> None:
    """A task that is to be forgotten pushes the other way; L1 pulls towards zero."""
    mixture = two_vectors(tmp_path)
    task = parse_task(str(task_file(tmp_path / "near.py", (BASE_W + ONE).tolist())), Setting())
    few = Settings(epochs=5, rate=0.01, decay=0.0)
    place = row_of(mixture, "one"), mixture.names.index("w")
    towards = learn(mixture, [task], few, "val").coefficients[place]
    away = learn(mixture, [task], few, "val", signs={task.name: -1.0}).coefficients[place]
    assert float(away) == pytest.approx(-float(towards), rel=1e-4)
    held = learn(mixture, [task], replace(few, epochs=300, l1=4.0), "val").coefficients[place]
    assert abs(float(held)) < 0.02


def test_runs_repeat(tmp_path: Path) -> None:
    """One seed, one result."""
    mixture = two_vectors(tmp_path)
    task = parse_task(str(task_file(tmp_path / "near.py", (BASE_W + ONE).tolist())), Setting())
    one, two = (learn(mixture, [task], Settings(epochs=7), "val") for _ in range(2))
    assert torch.equal(one.coefficients, two.coefficients)


def test_what_cannot_be_learned_from(tmp_path: Path) -> None:
    """Scorers without gradients, models without base, vectors of other tensors, infinite losses."""
    mixture = two_vectors(tmp_path)
    command = parse_task("t=program {path}", Setting())
    with pytest.raises(ParameterError, match="task t: cannot be learned from"):
        learn(mixture, [command], Settings(), "val")
    with pytest.raises(ParameterError, match="needs the base"):
        load_mixture(make(recipe_of(tmp_path / "one", tmp_path / "two"), "x").plan)
    with pytest.raises(ParameterError, match="no model moves any tensor"):
        mixture_of(tmp_path / "base", base=tmp_path / "base")
    huge = parse_task(str(task_file(tmp_path / "huge.py", [[1e30, 0], [0, 0]])), Setting())
    with pytest.raises(MergebenchError, match="the loss is inf at step 1"):
        learn(mixture, [huge], Settings(), "val")
