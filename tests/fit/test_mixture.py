"""Task vectors that learning holds, after the ops that come before coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from mergebench.core.errors import MergebenchError
from mergebench.merge.fit.mixture import Whole, each_tensor
from mergebench.merge.kernels import ready
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from tests.helpers.files import read, write

SHAPES = {"a.weight": (130, 70), "b.weight": (33, 517), "c.bias": (91,)}
BF16 = ml_dtypes.bfloat16


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Two models and their base in bf16, with ties among their magnitudes."""
    random = np.random.default_rng(0)
    base = {n: random.standard_normal(s).astype(BF16) for n, s in SHAPES.items()}
    write(tmp_path / "base.safetensors", base)
    for name in ("one", "two"):
        tuned = {
            n: (v + 0.1 * random.standard_normal(v.shape, np.float32)).astype(BF16)
            for n, v in base.items()
        }
        write(tmp_path / f"{name}.safetensors", tuned)
    models = tuple(ModelRef(str(tmp_path / f"{name}.safetensors")) for name in ("one", "two"))
    return Recipe(models, "", base=str(tmp_path / "base.safetensors"))


def held(recipe: Recipe, method: str, params: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Every vector by tensor, as float32 arrays."""
    made = Recipe(recipe.models, method, params, base=recipe.base, form="model")
    found = {}
    for name, _, vectors in each_tensor(make_plan(made, **options), torch.float32):
        rows = []
        for vector in vectors:
            assert isinstance(vector, Whole)
            rows.append(vector.values.numpy())
        found[name] = np.stack(rows)
    return found


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("task_arithmetic", {}),
        ("ties", {"scope": "tensor", "density": 0.3}),
        ("ties", {"scope": "model", "density": 0.3}),
        ("breadcrumbs", {}),
        ("breadcrumbs", {"scope": "tensor"}),
        ("dare", {"density": 0.4}),
        ("magnitude_prune", {"density": 0.4}),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_kernels_give_the_bits_of_the_ops(
    recipe: Recipe,
    method: str,
    params: dict[str, Any],
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With any number of threads."""
    monkeypatch.setenv(ready.VARIABLE, "off")
    expected = held(recipe, method, params, workers=1)
    monkeypatch.setenv(ready.VARIABLE, "on")
    found = held(recipe, method, params, workers=workers)

    assert sorted(found) == sorted(expected) == sorted(SHAPES)
    for name, values in found.items():
        assert values.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_trimmed_vectors(
    recipe: Recipe, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest magnitudes, of the sign that prevails: in float64, by a stable sort."""
    monkeypatch.setenv(ready.VARIABLE, kernels)
    found = held(recipe, "ties", {"scope": "tensor", "density": 0.25})

    base = read(tmp_path / "base.safetensors")
    tuned = [read(tmp_path / f"{model}.safetensors") for model in ("one", "two")]
    for name, values in found.items():
        wide = np.stack([each[name].astype(np.float64) - base[name] for each in tuned])
        flat = wide.reshape(2, -1)
        kept = np.zeros(flat.shape)
        for row, own in enumerate(flat):
            order = np.argsort(-np.abs(own), kind="stable")[: own.size // 4]
            kept[row, order] = own[order]
        total = kept.sum(axis=0)
        clear = total != 0
        kept[np.sign(kept) != np.sign(total)] = 0.0
        # Models stand in the order of their fingerprints.
        rows = sorted(values.reshape(2, -1)[:, clear].tolist())
        np.testing.assert_allclose(rows, sorted(kept[:, clear].tolist()), rtol=1e-6)


def test_what_is_not_finite_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By kernels as by ops."""
    tuned = dict(read(tmp_path / "one.safetensors"))
    tuned["b.weight"] = tuned["b.weight"].copy()
    tuned["b.weight"][3, 5] = np.nan
    write(tmp_path / "one.safetensors", tuned)
    for kernels in ("on", "off"):
        monkeypatch.setenv(ready.VARIABLE, kernels)
        with pytest.raises(MergebenchError, match=r"b\.weight"):
            held(recipe, "ties", {"scope": "tensor"})
