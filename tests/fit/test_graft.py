"""Grafting masks: where they start, how they move, and what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench import merge_models
from mergebench.core.errors import MergebenchError, ParameterError, ResourceError
from mergebench.merge import engine
from mergebench.merge.fit.candidate import Candidate
from mergebench.merge.fit.graft import Grafted, Settings, graft
from mergebench.merge.fit.task import Task
from mergebench.merge.plan import Plan
from mergebench.merge.sparse import write_sparse
from mergebench.recipe import Recipe
from tests.fit.networks import Runs
from tests.fit.support import make, recipe_of, save_model

BASE = np.zeros((2, 3))
#: The entry that moved most is of no use; the task wants the third one, which moved least.
TUNED = np.array([[4.0, 0.0, 0.25], [0.0, -1.0, 0.0]])


class Near(torch.nn.Module):
    """Parameters under the names of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2))

    def forward(self, one: torch.Tensor) -> torch.Tensor:
        """The weight."""
        found: torch.Tensor = self.w * one
        return found


class Target(Runs):
    """Squared distance from a target."""

    target = torch.tensor([[0.0, 0.0, 0.25], [0.0, -1.0, 0.0]])

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """The distance."""
        found: torch.Tensor = ((outputs - self.target) ** 2).sum()
        return found


def task() -> Task:
    """One batch of it."""
    return Task("target", Target(Near(), [(torch.ones(()),)]), "target")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """The model on its base."""
    base = save_model(tmp_path / "base", BASE)
    return recipe_of(save_model(tmp_path / "one", TUNED), base=str(base))


def learned(recipe: Recipe, **settings: Any) -> Grafted:
    """A mask of one entry out of eight at the start."""
    return graft(recipe, [task()], Settings(density=1 / 8, **settings), "val", make=make)


def test_memory_and_workers_are_those_of_the_candidates(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the task vector and its mask too, which are merges of their own."""
    seen = []
    run = engine._run

    def noted(plan: Plan, *given: Any, **options: Any) -> Any:
        seen.append((plan.tiling.workers, plan.form))
        return run(plan, *given, **options)

    monkeypatch.setattr(engine, "_run", noted)

    def made(memory: int) -> Grafted:
        def limited(asked: Recipe, label: str) -> Candidate:
            return Candidate(asked, label, memory=memory << 20, workers=3)

        return graft(recipe, [task()], Settings(density=1 / 8, epochs=1), "val", make=limited)

    with pytest.raises(ResourceError, match=r"this merge needs at least \d+ MiB"):
        made(40)
    seen.clear()
    made(200)

    assert sorted(form for _, form in seen) == ["delta", "delta", "model"]
    assert {workers for workers, _ in seen} == {3}


def mask_of(made: Grafted) -> list[int]:
    """Places of w that are kept."""
    assert set(made.sparse.diffs) <= {"w"}
    return made.sparse.diffs["w"][1].tolist() if made.sparse.diffs else []


def test_without_steps_it_is_the_largest(recipe: Recipe) -> None:
    """The baseline without data: the entries of largest magnitude, as method graft takes them."""
    made = learned(recipe, epochs=0)
    assert mask_of(made) == [0]
    assert made.sparse.diffs["w"][2].tolist() == [4.0]
    assert made.history == ((pytest.approx(16 + 0.25**2 + 1.0), 1),)
    assert (made.best, made.overlap) == (0, 1.0)


def test_a_step_is_the_derivative(recipe: Recipe) -> None:
    """S falls by rate · ∂L/∂S, the derivative through the sigmoid, and gates flip at 10."""
    logits = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    first, tau = torch.tensor(TUNED == 4.0).float(), torch.tensor(TUNED).float()
    gates = first + (1 - 2 * first) * torch.sigmoid(logits - 10)
    loss = ((gates * tau - Target.target) ** 2).sum() + 0.5 * gates.sum()
    (slope,) = torch.autograd.grad(loss, logits)
    rates = (10 - logits.detach()) / -slope
    usable = sorted(float(r) for r in rates.reshape(-1) if r > 0)
    below = learned(recipe, epochs=1, rate=usable[0] * 0.999, l1=0.5)
    above = learned(recipe, epochs=1, rate=usable[0] * 1.001, l1=0.5)
    assert below.history[1][1] == 1
    assert above.history[1][1] == 0
    assert above.history[1][0] == pytest.approx(0.25**2 + 1)


def test_the_mask_finds_what_the_task_needs(recipe: Recipe) -> None:
    """The useless entry leaves, the useful ones come, and the best epoch is kept."""
    made = learned(recipe, epochs=60, rate=2e4)
    assert mask_of(made) == [2, 4]
    assert made.history[made.best][0] == 0.0
    assert made.best == [loss for loss, _ in made.history].index(0.0)
    assert made.overlap == 0.0


def test_sparsity_costs(recipe: Recipe) -> None:
    """An L1 above what the small entry gains keeps it out."""
    made = learned(recipe, epochs=60, rate=2e4, l1=0.2)
    assert mask_of(made) == [4]


def test_what_is_written_merges(recipe: Recipe, tmp_path: Path) -> None:
    """The file is a task vector: on the base it is the masked fine-tune."""
    made = learned(recipe, epochs=60, rate=2e4)
    out = tmp_path / "graft.safetensors"
    write_sparse(made.sparse, out)
    found = merge_models([out], base=recipe.base, method="task_arithmetic", lam=1.0)
    np.testing.assert_array_equal(found["w"], Target.target.numpy())
    np.testing.assert_array_equal(found["b"], np.zeros(2))


def test_tensors_can_be_left_out(recipe: Recipe) -> None:
    """Excluded tensors are no part of the mask, nor of what can be learned."""
    with pytest.raises(ParameterError, match="depends on no tensor that may be grafted"):
        learned(replace(recipe, exclude=("w",)), epochs=1)


def test_runs_repeat(recipe: Recipe) -> None:
    """One seed, one mask."""
    one, two = (learned(recipe, epochs=5, rate=1e4) for _ in range(2))
    assert one.history == two.history
    assert mask_of(one) == mask_of(two)


def test_what_cannot_be_learned_from(recipe: Recipe) -> None:
    """Tasks without data, and no base."""
    with pytest.raises(ParameterError, match="task c: has no data"):
        graft(recipe, [Task("c", object(), "c")], Settings(), "val", make=make)
    with pytest.raises(MergebenchError, match="--base"):
        learned(replace(recipe, base=None))
