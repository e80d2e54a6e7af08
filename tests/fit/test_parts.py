"""aTLAS × K: coefficients of random parts, learned in memory and replayed by the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench.merge.fit.learn import Settings, learn
from mergebench.merge.fit.mixture import Factored, Mixture, Whole, load_mixture
from mergebench.recipe.reading import read_recipe, recipe_from_dict
from tests.fit.lines import lines, three_vectors
from tests.fit.support import make, recipe_of
from tests.helpers.adapters import factors, product, save_peft
from tests.helpers.models import base_model, fine_tune, save_folder
from tests.oracle.test_parts import part

PARTS, SEED = 3, 5


def mixture_of(*places: Path, base: Path) -> Mixture:
    """A mixture in parts of models on a base."""
    recipe = recipe_of(*places, base=str(base), method="task_arithmetic", params={"lam": 1.0})
    return load_mixture(make(recipe, "m").plan, torch.float32, parts=PARTS, seed=SEED)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Mixture, dict[str, Any], dict[str, Any]]:
    """A full fine-tune and an adapter of one base, the base, and the adapter's updates."""
    base = base_model()
    under = save_folder(tmp_path / "base", base)
    made = factors(5, rank=2)
    places = save_folder(tmp_path / "ft", fine_tune(base, 1)), save_peft(tmp_path / "lora", made)
    return mixture_of(*places, base=under), base, product(made, 2.0)


def drawn(mixture: Mixture, seed: int = 0) -> torch.Tensor:
    """Coefficients for every vector, tensor and part."""
    shape = (len(mixture.vectors), mixture.columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(vector: Whole | Factored) -> np.ndarray:
    """A task vector, entry by entry in float64."""
    if isinstance(vector, Whole):
        return vector.values.double().numpy().reshape(-1)
    return (vector.left.double() @ vector.right.double()).numpy().reshape(-1)


def masks(name: str, size: int) -> np.ndarray:
    """(K, size) of zeros and ones."""
    parts = np.array([part(SEED, name, index, PARTS) for index in range(size)])
    return np.stack([parts == k for k in range(PARTS)]).astype(np.float64)


def assert_mixed(mixture: Mixture, coefficients: torch.Tensor, got: dict[str, Any]) -> None:
    """``θ0 + Σ_i (Σ_k λ_ik m_k) ⊙ τ_i`` in float64, tensor by tensor."""
    for place, (name, base) in enumerate(mixture.base.items()):
        mask = masks(name, base.numel())
        np.testing.assert_array_equal(mask.sum(0), 1.0)
        wanted = base.double().numpy().reshape(-1)
        for row, vectors in enumerate(mixture.vectors):
            if name in vectors:
                own = coefficients[row, place * PARTS : (place + 1) * PARTS].double().numpy()
                wanted = wanted + (own @ mask) * dense(vectors[name])
        np.testing.assert_allclose(
            np.asarray(got[name]).reshape(-1), wanted, rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_values_and_replay(models: Any) -> None:
    """In memory, and out of the recipe by the engine: the same model, by the equation."""
    mixture, _, updates = models
    coefficients = drawn(mixture)
    kinds = {type(vector) for row in mixture.vectors for vector in row.values()}
    assert kinds == {Whole, Factored}
    assert_mixed(mixture, coefficients, mixture.values(coefficients))
    recipe = mixture.recipe(coefficients)
    assert recipe.method == "atlas"
    with make(recipe, "result") as candidate:
        assert_mixed(mixture, coefficients, candidate.arrays())
    # No mask is stored: as many numbers as there are coefficients, and the seed.
    again = recipe_from_dict(recipe.to_dict(), "round trip")
    assert again.to_dict() == recipe.to_dict()
    with make(again, "again") as candidate:
        assert_mixed(mixture, coefficients, candidate.arrays())
    numbers = [
        text.split("/") for ref in recipe.models for _, text in ref.params["coefficients"].pairs
    ]
    assert {len(each) for each in numbers} == {PARTS}
    assert len(numbers) == sum(map(len, mixture.vectors))
    assert set(updates) <= set(mixture.names)


def test_gradients_are_inner_products_of_parts(models: Any) -> None:
    """∂L/∂λ_ijk = ⟨∂L/∂θ_j, m_jk ⊙ τ_ij⟩, and finite differences of the loss say the same."""
    mixture, _, _ = models
    at = drawn(mixture, 2)
    gradients = {name: torch.cos(value) for name, value in mixture.values(at).items()}
    found = mixture.gradient(gradients)
    assert found.shape == at.shape
    for place, (name, base) in enumerate(mixture.base.items()):
        mask = masks(name, base.numel())
        for row, vectors in enumerate(mixture.vectors):
            wanted = np.zeros(PARTS)
            if name in vectors:
                gradient = gradients[name].double().numpy().reshape(-1)
                wanted = (mask * gradient * dense(vectors[name])).sum(1)
            own = found[row, place * PARTS : (place + 1) * PARTS].numpy()
            np.testing.assert_allclose(own, wanted, rtol=1e-3, atol=1e-3)
    # Along one direction, of all coefficients at once.
    step = 1e-2 * drawn(mixture, 3)

    def loss(coefficients: torch.Tensor) -> float:
        return sum(
            float(torch.sin(v.double()).sum()) for v in mixture.values(coefficients).values()
        )

    slope = (loss(at + step) - loss(at - step)) / 2
    assert slope == pytest.approx(float((found * step).sum()), rel=2e-2)


def test_parts_are_learned(tmp_path: Path) -> None:
    """More coefficients fit better, and one of a part moves with its part alone."""
    settings = Settings(epochs=60, rate=0.05, decay=0.0)
    whole = learn(three_vectors(tmp_path / "a"), [lines()], settings, "val")
    mixture = three_vectors(tmp_path / "b", parts=4)
    split = learn(mixture, [lines()], settings, "val")
    assert split.coefficients.shape == (3, 4 * len(mixture.names))
    assert split.history[-1] < whole.history[-1] < whole.history[0]


def test_recipes_of_parts_round_trip(tmp_path: Path) -> None:
    """Through YAML to the bit: float32 numbers are written as short as they can be."""
    mixture = three_vectors(tmp_path, parts=2)
    coefficients = drawn(mixture, 4)
    place = tmp_path / "r.yaml"
    place.write_text(mixture.recipe(coefficients).to_yaml())
    again = read_recipe(place)
    order = [Path(ref.path).name for ref in again.models]
    rows = [Path(model.label).name for model in mixture.plan.models]
    for name, ref in zip(order, again.models, strict=True):
        row = coefficients[rows.index(name)].reshape(-1, 2)
        for tensor, text in ref.params["coefficients"]["by_name"].items():
            own = [np.float32(each) for each in text.split("/")]
            np.testing.assert_array_equal(own, row[mixture.names.index(tensor)].numpy())
