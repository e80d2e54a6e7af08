"""Which blocks are worth learning, by their gradients at the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.merge.fit import memory
from mergebench.merge.fit.atlas import SETTINGS
from mergebench.merge.fit.blocks import informative
from mergebench.merge.fit.learn import Settings, learn
from mergebench.merge.fit.memory import advised, check_room, needed
from mergebench.merge.fit.mixture import Mixture, load_mixture
from mergebench.merge.fit.task import Task
from tests.fit.lines import DIRECTIONS, lines, three_vectors
from tests.fit.support import make, recipe_of
from tests.helpers.adapters import factors, save_peft
from tests.helpers.models import base_model, fine_tune, save_folder

ADDITION = SETTINGS["addition"]


def named(mixture: Mixture, blocks: Any) -> set[tuple[str, str]]:
    """Blocks by the names of tensors and of directions."""
    rows = [Path(each.label).name for each in mixture.plan.models]
    return {(name, rows[row]) for name, row in blocks}


def uneven() -> Task:
    """More points of the first class, so that b has a gradient."""
    task = lines()
    task.scorer.labels[:8] = 0
    return task


def by_hand(task: Task, shift: float = 0.25) -> dict[tuple[str, str], float]:
    """|⟨∂L/∂θ, τ⟩| at the base, mean over batches, by differentiating the loss itself."""
    found: dict[tuple[str, str], float] = {}
    w, b = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    batches = list(task.scorer.batches("val"))
    for each in batches:
        logits = each["x"] @ w.T + b
        (torch.nn.functional.cross_entropy(logits, each["labels"]) / len(batches)).backward()
    assert w.grad is not None
    assert b.grad is not None
    for name, direction in DIRECTIONS.items():
        found["w", name] = abs(float((w.grad * torch.tensor(direction)).sum()))
    found["b", "right"] = abs(float((b.grad * torch.tensor([shift, -shift])).sum()))
    return found


def test_the_most_of_each_tensor(tmp_path: Path) -> None:
    """The paper's b: of each tensor the vectors with the largest gradients."""
    mixture = three_vectors(tmp_path)
    sizes = by_hand(lines())
    ranked = sorted(DIRECTIONS, key=lambda name: -sizes["w", name])
    for most in (1, 2, 3):
        found = informative(mixture.plan, [lines()], ADDITION, "val", most=most)
        assert named(mixture, found) == {*(("w", n) for n in ranked[:most]), ("b", "right")}


def test_what_fits_a_budget(tmp_path: Path) -> None:
    """The largest gradients per byte, until nothing more fits."""
    # Less than the second largest, but not by byte.
    second = sorted(by_hand(uneven())["w", name] for name in DIRECTIONS)[1]
    shift = 0.8 * second / by_hand(uneven(), 1.0)["b", "right"]
    mixture = three_vectors(tmp_path, shift)
    sizes = by_hand(uneven(), shift)
    assert second / 2 < sizes["b", "right"] < second
    # Vectors are held in float16: four entries of w, two of b.
    cost = {block: 8 if block[0] == "w" else 4 for block in sizes}
    ranked = sorted(sizes, key=lambda block: -sizes[block] / cost[block])
    for budget in (4, 8, 12, 16, 20, 28):
        wanted, left = set(), budget
        for block in ranked:
            if cost[block] <= left:
                wanted.add(block)
                left -= cost[block]
        found = informative(mixture.plan, [uneven()], ADDITION, "val", budget=budget)
        assert named(mixture, found) == wanted
    with pytest.raises(ParameterError, match="no block of a task vector fits"):
        informative(mixture.plan, [lines()], ADDITION, "val", budget=3)


def test_only_what_is_held_is_learned(tmp_path: Path) -> None:
    """Others stay at zero in the recipe, and take no memory."""
    mixture = three_vectors(tmp_path)
    chosen = informative(mixture.plan, [lines()], ADDITION, "val", budget=12)
    held = load_mixture(mixture.plan, keep=lambda name, row: (name, row) in chosen)
    assert held.bytes <= 12
    learned = learn(held, [lines()], replace(ADDITION, epochs=3, rate=0.1), "val")
    recipe = held.recipe(learned.coefficients)
    for ref in recipe.models:
        row = [each.label for each in held.plan.models].index(ref.path)
        names = {name for name, of in chosen if of == row}
        pairs = dict(ref.weight.pairs) if names else {}
        assert set(pairs) == names
        assert all(pairs.values())
    with make(recipe, "result") as candidate:
        arrays = candidate.arrays()
    for name, value in held.values(learned.coefficients).items():
        torch.testing.assert_close(torch.tensor(arrays[name]), value)


def test_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, model and gradients in float32, vectors in float16, factors in float32."""
    base = base_model()
    under = save_folder(tmp_path / "base", base)
    full = save_folder(tmp_path / "ft", fine_tune(base, 1))
    adapter = save_peft(tmp_path / "lora", factors(5, rank=2))
    recipe = recipe_of(full, adapter, base=str(under), method="task_arithmetic")
    plan = make(recipe, "x").plan
    size = sum(item.site.size for item in plan.aligned.items.values())
    held = load_mixture(plan)
    assert needed(plan) == 12 * size + held.bytes
    assert needed(plan, 100) == 12 * size + 100
    check_room(plan, "cpu")
    monkeypatch.setattr(memory, "there", lambda device: 12 * size + 99)
    with pytest.raises(MergebenchError, match=r"learning needs at least .* on cpu, got") as error:
        check_room(plan, "cpu", 100)
    assert "--budget" in error.value.fix


def test_running_out_of_memory_gives_advice(tmp_path: Path) -> None:
    """Whoever runs out: torch on either device, or Python."""
    mixture = three_vectors(tmp_path)

    class Hungry(type(lines().scorer)):  # type: ignore[misc]
        def __init__(self, error: Any) -> None:
            super().__init__()
            self.error = error

        def loss(self, outputs: Any, batch: Any) -> Any:
            if self.error is None:
                # More than any machine has; refused without touching it.
                return torch.empty(1 << 56).sum()
            raise self.error

    for error in (None, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")):
        task = replace(lines(), scorer=Hungry(error))
        with pytest.raises(MergebenchError, match="learning ran out of memory on cpu") as raised:
            learn(mixture, [task], Settings(), "val")
        for word in ("--budget", "--blocks", "adapters", "--batch-size", "--precision"):
            assert word in raised.value.fix
        assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="something else"), advised("cpu"):
        raise RuntimeError("something else")
