"""Models in memory have every tensor that the written merge has, those of the base among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench.core.errors import MismatchError
from mergebench.merge.engine import execute
from mergebench.merge.fit.atlas import SETTINGS
from mergebench.merge.fit.forward import forward_of
from mergebench.merge.fit.live import fill
from mergebench.merge.fit.mixture import load_mixture
from mergebench.merge.fit.objectives import loss_of
from mergebench.merge.planning import make_plan
from mergebench.recipe import Recipe
from tests.fit.networks import task_of, values_of
from tests.fit.support import make, recipe_of
from tests.helpers.files import read, write

#: What is merged of the network; the rest is the base's.
WAYS: dict[str, dict[str, Any]] = {
    "models that lack tensors": {"on_mismatch": "base"},
    "tensors left out": {"exclude": (r"layers\.1\.lin\.bias", "head")},
    "one layer alone": {"include": (r"layers\.0",)},
}
LACKING = ("head.weight", "layers.1.lin.bias")


def recipe_with(folder: Path, way: str, **more: Any) -> Recipe:
    """Two models on a base, of which tensors come from the base alone."""
    for name, seed in (("base", 0), ("one", 1), ("two", 2)):
        values = values_of(seed)
        if way == "models that lack tensors" and name != "base":
            values = {key: each for key, each in values.items() if key not in LACKING}
        (folder / name).mkdir()
        write(folder / name / "model.safetensors", values)
    return recipe_of(folder / "one", folder / "two", base=str(folder / "base"),
                     method="task_arithmetic", params={"lam": 1.0}, form="model",
                     **WAYS[way], **more)  # fmt: skip


def loaded(recipe: Recipe, out: Path) -> torch.nn.Module:
    """The merge as it is written, in the task's network."""
    execute(make_plan(Recipe(**{**vars(recipe), "out": str(out)})))
    module: torch.nn.Module = task_of().scorer.module()
    module.load_state_dict({n: torch.tensor(np.array(each)) for n, each in read(out).items()})
    return module


def assert_equal_tensors(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Bit for bit."""
    assert set(one.state_dict()) == set(other.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_scored_models_have_the_bases_tensors(tmp_path: Path, way: str) -> None:
    """A module with other values takes all of them, whatever it held before."""
    recipe = recipe_with(tmp_path, way)
    module = task_of().scorer.module()
    with make(recipe, "x") as candidate:
        fill(module, candidate.arrays())
    written = loaded(recipe, tmp_path / "out")
    assert_equal_tensors(module, written)
    base = read(tmp_path / "base")
    np.testing.assert_array_equal(module.state_dict()["head.weight"], base["head.weight"])
    # And not because nothing was merged.
    assert not np.array_equal(
        module.state_dict()["layers.0.lin.weight"], base["layers.0.lin.weight"]
    )


@pytest.mark.parametrize("way", WAYS)
def test_learned_models_have_the_bases_tensors(tmp_path: Path, way: str) -> None:
    """The loss that is learned from is that of the merge as it is written and loaded."""
    recipe = recipe_with(tmp_path, way)
    mixture = load_mixture(make(recipe, "x").plan, torch.float32)
    task, settings = task_of(), SETTINGS["addition"]
    forward = forward_of(mixture.plan, [task], settings, "val", "cpu")
    coefficients = torch.full((2, mixture.columns), 0.5)
    with torch.no_grad():
        for name, value in mixture.each_value(coefficients):
            forward.parameters[name].copy_(value)
    written = loaded(mixture.recipe(coefficients), tmp_path / "out")
    for name in set(values_of(0)) - set(mixture.names):
        assert torch.equal(forward.module.state_dict()[name], written.state_dict()[name]), name
    loss = loss_of(forward, settings, None).of(0, 0, 0.0, torch.Generator())
    batch = next(iter(task.scorer.batches("val")))
    expected = task.scorer.loss(task.scorer.forward(written, batch), batch)
    torch.testing.assert_close(loss, expected)


def test_a_tensor_that_no_input_has(tmp_path: Path) -> None:
    """Is refused: a module would keep whatever it was made with."""
    recipe = recipe_with(tmp_path, "models that lack tensors")
    for name in ("base", "one", "two"):
        values = {n: each for n, each in read(tmp_path / name).items() if n != "head.weight"}
        write(tmp_path / name / "model.safetensors", values)
    with make(recipe, "x") as candidate, pytest.raises(MismatchError, match=r"head\.weight"):
        fill(task_of().scorer.module(), candidate.arrays())
    with pytest.raises(MismatchError, match=r"head\.weight"):
        forward_of(make(recipe, "x").plan, [task_of()], SETTINGS["addition"], "val", "cpu")
