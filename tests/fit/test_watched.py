"""Scores along the way: the best epoch, stopping early, what negation keeps; and precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench.core.errors import ParameterError
from mergebench.merge.device.choose import torch_device
from mergebench.merge.fit.adamerging import METHOD, PLUS
from mergebench.merge.fit.adamerging import SETTINGS as ADAMERGING
from mergebench.merge.fit.atlas import SETTINGS as ATLAS
from mergebench.merge.fit.find import Setting, parse_task
from mergebench.merge.fit.learn import Settings, learn
from mergebench.merge.fit.mixture import load_mixture
from mergebench.merge.fit.scores import Scores
from mergebench.merge.fit.watch import watch
from tests.fit.lines import lines, three_vectors
from tests.fit.support import F32, make, recipe_of, save_model, task_file


def test_published_settings() -> None:
    """Of the papers: rates, epochs or steps, decay, bounds, start."""
    for name, rate, epochs in (
        ("addition", 1e-3, 20), ("negation", 5e-3, 10), ("few-shot", 1e-1, 10),
        ("test-time", 1e-3, 10),
    ):  # fmt: skip
        each = ATLAS[name]
        assert (each.rate, each.epochs, each.decay, each.clip) == (rate, epochs, 0.1, 1.0), name
        assert (each.start, each.low, each.high, each.shared) == (0.0, None, None, False)
    assert ATLAS["test-time"].cosine
    for shared, each in zip((False, True), ADAMERGING.values(), strict=True):
        assert (each.rate, each.steps, each.decay, each.clip) == (1e-3, 500, 0.0, 0.0)
        assert (each.start, each.low, each.high, each.shared) == (0.3, 0.0, 1.0, shared)
        assert each.objective == "entropy"


def test_steps_are_counted(tmp_path: Path) -> None:
    """Not epochs, where steps are asked for: 7 steps of 3 batches end within the third epoch."""
    seen: list[tuple[int, int]] = []
    learned = learn(
        three_vectors(tmp_path), [lines()], Settings(steps=7), "val",
        tell=lambda what, done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(step, 7) for step in range(1, 8)]
    assert len(learned.history) == 3


def test_what_is_told(tmp_path: Path) -> None:
    """Loss and score."""
    told: list[str] = []
    learn(
        three_vectors(tmp_path), [lines()], Settings(epochs=2), "val",
        tell=lambda what, done, total: told.append(what), watch=lambda coefs, epoch: 0.5 + epoch,
    )  # fmt: skip
    assert told[0].startswith("epoch 1, loss 0.69")
    assert told[0].endswith(", score 0.5")
    assert told[-1].endswith(", score 1.5")


def test_the_best_epoch_is_taken(tmp_path: Path) -> None:
    """The first of the best, the start among them; a missing score is never it."""
    mixture = three_vectors(tmp_path)
    for values, wanted in (([0.1, 0.3, None, 0.3], 1), ([0.9, 0.3, 0.5, 0.3], 0)):
        seen: list[torch.Tensor] = []

        def score(
            coefficients: torch.Tensor, epoch: int, seen: Any = seen, values: Any = values
        ) -> float | None:
            seen.append(coefficients.clone())
            return values[epoch]  # type: ignore[no-any-return]

        learned = learn(mixture, [lines()], Settings(epochs=3, rate=0.1), "val", watch=score)
        assert (learned.epoch, learned.scores) == (wanted, tuple(values))
        assert torch.equal(learned.coefficients, seen[wanted])
        assert not torch.equal(seen[0], seen[1])


def test_patience(tmp_path: Path) -> None:
    """Ends so many epochs after the best, by scores or else by the loss."""
    mixture = three_vectors(tmp_path)
    values = [0.1, 0.2, 0.3, 0.2, 0.1, 0.9]
    settings = Settings(epochs=5, rate=0.1, patience=2)
    learned = learn(mixture, [lines()], settings, "val", watch=lambda c, epoch: values[epoch])
    assert (learned.epoch, len(learned.history)) == (2, 4)
    # Rising entropy: the first epoch is the best, and two more are waited for.
    away = replace(settings, objective="entropy", start=1.0, epochs=30)
    risen = learn(mixture, [lines()], away, "val", signs={"lines": -1.0})
    assert (risen.epoch, len(risen.history)) == (1, 3)
    assert list(risen.history) == sorted(risen.history)


def test_scores_of_what_is_learned(tmp_path: Path) -> None:
    """The merge of the recipe is scored, on the split that is named."""
    mixture = three_vectors(tmp_path)
    task = lines()
    score = watch(mixture.recipe, Scores([task]), "val", make)
    coefficients = torch.tensor([[0.5] * 2, [0.25] * 2, [0.0] * 2])
    value = score(coefficients, 3)
    assert value == task.scorer.score(_Arrays(mixture.values(coefficients)), "val")["accuracy"]
    np.testing.assert_allclose(task.scorer.scored[0], task.scorer.scored[1])


class _Arrays:
    label = "x"

    def __init__(self, values: Any) -> None:
        self.values = {name: value.numpy() for name, value in values.items()}

    def arrays(self) -> Any:
        return self.values


def test_negation_keeps_the_others(tmp_path: Path) -> None:
    """How bad the forgotten task is, unless another falls below 95% of its start."""
    mixture = three_vectors(tmp_path)

    class Fixed:
        def __init__(self, *values: float) -> None:
            self.values = iter(values)

        def score(self, model: Any, split: str) -> dict[str, float]:
            return {"accuracy": next(self.values)}

    keep, forgotten = Fixed(0.8, 0.77, 0.75, 0.9), Fixed(0.6, 0.3, 0.1, 0.5)
    tasks = [
        replace(lines("keep"), scorer=keep),
        replace(lines("forget"), scorer=forgotten),
    ]
    score = watch(mixture.recipe, Scores(tasks), "val", make, ["forget"])
    drawn = [torch.full((3, 2), float(epoch)) for epoch in range(4)]
    # .77 is more than .95 · .8 = .76, which .75 is not.
    assert [score(each, epoch) for epoch, each in enumerate(drawn)] == [-0.6, -0.3, None, -0.5]


def test_forgetting_one_of_two(tmp_path: Path) -> None:
    """Loss of one falls while that of the other rises."""
    mixture = three_vectors(tmp_path)
    keep, forget = lines("keep"), lines("forget", seed=3)
    flipped = forget.scorer.labels
    forget.scorer.labels = 1 - flipped
    settings = replace(ATLAS["negation"], rate=0.1)
    learned = learn(mixture, [keep, forget], settings, "val", signs={"forget": -1.0})
    before = {t.name: t.scorer.score(_Arrays(dict(mixture.base)), "val") for t in (keep, forget)}
    now = _Arrays(mixture.values(learned.coefficients))
    assert keep.scorer.score(now, "val")["loss"] < before["keep"]["loss"]
    assert forget.scorer.score(now, "val")["loss"] > before["forget"]["loss"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(tmp_path: Path, precision: Any) -> None:
    """Products are rounded, so that coefficients differ a little; they and the vectors are not."""
    mixture = three_vectors(tmp_path)
    settings = Settings(epochs=10, rate=0.05)
    full = learn(mixture, [lines()], settings, "val")
    seen: list[torch.dtype] = []
    task = lines()
    given = task.scorer.loss

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        seen.append(outputs.dtype)
        return given(outputs, batch)  # type: ignore[no-any-return]

    task.scorer.loss = loss
    mixed = learn(mixture, [task], replace(settings, precision=precision), "val")
    assert set(seen) == {getattr(torch, precision)}
    assert mixed.coefficients.dtype == torch.float32
    assert not torch.equal(mixed.coefficients, full.coefficients)
    torch.testing.assert_close(mixed.coefficients, full.coefficients, rtol=0, atol=0.03)


def test_devices() -> None:
    """As merges spell them; what is not there is refused in one line."""
    assert torch_device("cpu") == torch_device("torch") == "cpu"
    if not torch.cuda.is_available():
        assert torch_device("auto") == "cpu"
    for device in ("gpu", "cuda:x", f"cuda:{torch.cuda.device_count()}", "meta"):
        with pytest.raises(ParameterError, match="--device"):
            torch_device(device)


def test_what_does_not_move_is_the_base(tmp_path: Path) -> None:
    """Values that a task's module happens to have do not matter, of no tensor."""
    base = save_model(tmp_path / "base", np.eye(2), (0.5, -0.5))
    moved = save_model(tmp_path / "moved", 2 * np.eye(2), (0.5, -0.5))
    recipe = recipe_of(moved, base=str(base), method="task_arithmetic", params={"lam": 1.0})
    mixture = load_mixture(make(recipe, "x").plan, torch.float32)
    assert mixture.names == ("w",)
    task = lines()
    seen: list[torch.Tensor] = []
    given = task.scorer.loss

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        seen.append(outputs.detach().clone())
        return given(outputs, batch)  # type: ignore[no-any-return]

    task.scorer.loss = loss
    task.scorer.labels = torch.zeros(24, dtype=torch.long)
    learn(mixture, [task], Settings(steps=1, rate=0.0), "val")
    shown = [b["x"] + torch.tensor([0.5, -0.5]) for b in task.scorer.batches("val")]
    assert any(torch.allclose(seen[0], each) for each in shown)


def test_few_shots(tmp_path: Path) -> None:
    """A task that can is asked for a few of each class, one that cannot is refused."""
    mixture = three_vectors(tmp_path)
    task = lines()
    settings = replace(ATLAS["few-shot"], shots=2, seed=4)
    with pytest.raises(ParameterError, match="a few examples of each class"):
        learn(mixture, [task], settings, "val")
    asked: list[tuple[str, int, int]] = []

    def few(split: str, shots: int, seed: int) -> Any:
        asked.append((split, shots, seed))
        return [{"x": torch.ones(4, 2), "labels": torch.tensor([0, 1, 0, 1])}]

    task.scorer.few = few
    learned = learn(mixture, [task], settings, "train")
    assert asked == [("train", 2, 4)]
    assert len(learned.history) == 10


def test_adamerging_pp_learns_on_what_ties_leaves(tmp_path: Path) -> None:
    """Trimmed to ρ of the model, disagreeing signs silenced, then weighed: by hand."""
    base = save_model(tmp_path / "base", np.zeros((2, 3)))
    one = save_model(tmp_path / "one", [[3.0, -1.0, 0.5], [2.0, -4.0, 0.0]])
    two = save_model(tmp_path / "two", [[-2.0, -1.5, 0.2], [2.0, 4.5, 0.0]])
    # Of 8 entries (b too) half: 3, -1, 2, -4 and -2, -1.5, 2, 4.5; signs +, -, +, +.
    left = {
        "one": [[3.0, -1.0, 0.0], [2.0, 0.0, 0.0]],
        "two": [[0.0, -1.5, 0.0], [2.0, 4.5, 0.0]],
    }
    method, params = PLUS
    options = dict(each.split("=") for each in [*params, "density=0.5"])
    recipe = recipe_of(one, two, base=str(base), method=method, params=options)
    mixture = load_mixture(make(recipe, "x").plan, torch.float32)
    rows = [Path(each.label).name for each in mixture.plan.models]
    for name, vectors in zip(rows, mixture.vectors, strict=True):
        np.testing.assert_array_equal(vectors["w"].values, left[name])
        assert set(vectors) == {"w"}
    coefficients = torch.tensor([[0.25], [0.75]])
    made = mixture.recipe(coefficients)
    assert (made.method, made.params["divisor"]) == ("ties", "none")
    with make(made, "x") as candidate:
        got = candidate.arrays()["w"]
    wanted = sum(float(coefficients[rows.index(n), 0]) * np.array(left[n]) for n in rows)
    np.testing.assert_allclose(got, wanted.astype(F32), rtol=1e-6)
    (values,) = mixture.values(coefficients).values()
    np.testing.assert_allclose(values, wanted, rtol=1e-6)
    assert METHOD[0] == "task_arithmetic"


def test_adamerging_starts_at_task_arithmetic(tmp_path: Path) -> None:
    """At step 0 it is λ = 0.3, of one coefficient per model too."""
    mixture = three_vectors(tmp_path)
    for by, count in (("tensor", 2), ("task", 1)):
        seen: list[torch.Tensor] = []

        def score(coefficients: torch.Tensor, epoch: int, seen: Any = seen) -> float:
            seen.append(coefficients.clone())
            return float(epoch)

        learned = learn(
            mixture, [lines()], replace(ADAMERGING[by], steps=30, rate=0.02), "val", watch=score
        )
        assert torch.equal(seen[0], torch.full((3, 2), 0.3))
        assert learned.history[-1] < learned.history[0]
        assert {len(set(row.tolist())) for row in learned.coefficients} <= {1, count}


def test_quadratics_from_a_file(tmp_path: Path) -> None:
    """In parts too an exact combination is found, by a task out of a file."""
    mixture = three_vectors(tmp_path, parts=2, seed=1)
    wanted = torch.tensor([[0.5, -1.0, 0.75, 1.5]] * 3)
    target = mixture.values(wanted)["w"]
    task = parse_task(str(task_file(tmp_path / "near.py", target.tolist())), Setting())
    learned = learn(mixture, [task], Settings(epochs=500, rate=0.03, decay=0.0), "val")
    found = mixture.values(learned.coefficients)["w"]
    torch.testing.assert_close(found, target, rtol=0, atol=2e-3)
    assert learned.history[-1] < 1e-5


def test_as_autograd_through_the_chain(tmp_path: Path) -> None:
    """A step's gradient is that of the module called with what the ops make of weighed vectors."""
    mixture = three_vectors(tmp_path)
    task = lines(count=8)
    (batch,) = task.scorer.batches("val")
    leaf = torch.tensor([[0.3, -0.2], [0.7, 0.4], [-0.5, 0.1]], requires_grad=True)
    chain = mixture.plan.variants[0].ops
    values = {}
    for column, (name, base) in enumerate(mixture.base.items()):
        item = mixture.plan.aligned.items[name]
        rows = [
            vectors[name].values if name in vectors else torch.zeros_like(base)
            for vectors in mixture.vectors
        ]
        stack = torch.stack(rows).reshape(3, -1) * leaf[:, column : column + 1]
        for each in chain:
            stack = each.apply(
                stack, replace(item.at(0, item.site.size), weights=(1.0,) * len(stack))
            )
        values[name] = base + stack.reshape(base.shape)
    outputs = torch.func.functional_call(task.scorer.module(), values, kwargs=batch)
    task.scorer.loss(outputs, batch).backward()
    at = {
        name: value.detach().requires_grad_()
        for name, value in mixture.values(leaf.detach()).items()
    }
    outputs = torch.func.functional_call(task.scorer.module(), at, kwargs=batch)
    task.scorer.loss(outputs, batch).backward()
    found = mixture.gradient({name: value.grad for name, value in at.items()})
    assert leaf.grad is not None
    torch.testing.assert_close(found, leaf.grad)
    assert int((found != 0).sum()) == 4
