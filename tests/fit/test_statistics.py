"""Fisher and Gram matrices against what they are by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench import merge_models
from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.merge.collected import open_collected
from mergebench.merge.fit.candidate import only
from mergebench.merge.fit.fishers import fisher_of
from mergebench.merge.fit.grams import grams_of, linear_weights
from mergebench.merge.fit.statistics import How, Statistics, collect, save
from mergebench.merge.fit.task import Task
from mergebench.merge.fit.through import collect_through
from tests.contract.assertions import assert_close
from tests.fit.networks import Runs, save_network, task_of, values_of
from tests.fit.support import make, recipe_of
from tests.helpers.files import write

F64 = np.float64


class Logistic(torch.nn.Module):
    """Logits ``x Wᵀ``."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.from_numpy(weight.copy()))
        self.idle = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor, labels: Any) -> torch.Tensor:
        """Logits."""
        return x @ self.w.T


class Classes(Runs):
    """Cross-entropy of the logits."""

    def logits(self, outputs: Any, batch: Any) -> Any:
        """As they are."""
        return outputs

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Mean cross-entropy."""
        return torch.nn.functional.cross_entropy(outputs, batch["labels"])


RANDOM = np.random.default_rng(0)
W = RANDOM.normal(size=(3, 2)).astype(np.float32)
X = RANDOM.normal(size=(6, 2)).astype(np.float32)
LABELS = np.array([0, 1, 2, 2, 0, 1])
P = np.exp(X @ W.T) / np.exp(X @ W.T).sum(axis=1, keepdims=True)


def squares(x: np.ndarray, p: np.ndarray, label: int) -> np.ndarray:
    """The squared gradient of log p(label | x), which is ``(e - p) xᵀ``."""
    found: np.ndarray = np.outer(np.eye(3)[label] - p, x).astype(F64) ** 2
    return found


EXPECTED = {
    "expected": sum(
        p[y] * squares(x, p, y) for x, p in zip(X, P, strict=True) for y in range(3)
    ) / 6,
    "true": sum(squares(x, p, y) for x, p, y in zip(X, P, LABELS, strict=True)) / 6,
}  # fmt: skip


def classes(size: int) -> Task:
    """The data in batches of a size."""
    batches = [
        {"x": torch.from_numpy(X[i : i + size]), "labels": torch.from_numpy(LABELS[i : i + size])}
        for i in range(0, 6, size)
    ]
    return Task("classes", Classes(Logistic(W), batches), "classes")


@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize("labels", ["expected", "true"])
def test_fishers_of_logistic_regression(labels: Any, size: int) -> None:
    """The mean of squared gradients of single examples, whatever the batches."""
    found, count = fisher_of(Logistic(W), [classes(size)], "val", labels=labels)
    assert count == 6
    np.testing.assert_allclose(found["w"].numpy(), EXPECTED[labels], rtol=1e-5)
    assert found["idle"].tolist() == [0.0, 0.0]


def test_sampled_labels_are_the_expectation_on_average() -> None:
    """Classes drawn from the predictions: repeatable by seed, and without bias."""

    def once(seed: int) -> np.ndarray:
        found, _ = fisher_of(Logistic(W), [classes(6)], "val", labels="sampled", seed=seed)
        return found["w"].numpy().astype(F64)

    assert np.array_equal(once(3), once(3))
    drawn = np.stack([once(seed) for seed in range(200)])
    error = np.abs(drawn.mean(axis=0) - EXPECTED["expected"])
    assert np.all(error <= 4 * drawn.std(axis=0) / np.sqrt(200))


def test_fewer_batches() -> None:
    """Of two batches only the first, and its examples count."""
    found, count = fisher_of(Logistic(W), [classes(3)], "val", labels="true", most=1)
    wanted = sum(squares(X[i], P[i], LABELS[i]) for i in range(3)) / 3
    assert count == 3
    np.testing.assert_allclose(found["w"].numpy(), wanted, rtol=1e-5)


class Conv1D(torch.nn.Module):
    """As transformers has it: stored input × output."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight = 2, torch.nn.Parameter(torch.ones(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return x @ self.weight


def ran(module: torch.nn.Module, *batches: Any, **options: Any) -> Any:
    """Gram matrices of a module on batches."""
    return grams_of(module, [Task("t", Runs(module, list(batches)), "t")], "val", **options)[0]


def test_grams_are_products_of_inputs() -> None:
    """``XᵀX`` per input over all batches, of linear layers and of those stored transposed."""
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    flat = x.reshape(-1, 3).numpy().astype(F64)
    for module in (torch.nn.Linear(3, 2), Conv1D()):
        found = ran(module, (x[:1],), (x[1:],))["weight"]
        assert found.rows == 10
        np.testing.assert_allclose(found.mean().numpy(), flat.T @ flat / 10, rtol=1e-6)


class Masked(torch.nn.Module):
    """A linear layer over tokens, some of which are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lin = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 2)

    def forward(self, input_ids: Any, attention_mask: Any) -> torch.Tensor:
        """Embed and multiply."""
        found: torch.Tensor = self.lin(self.embed(input_ids))
        return found


def test_padding_is_no_input() -> None:
    """Places that the attention mask leaves out do not count, in layers and in embeddings."""
    module = Masked()
    ids = torch.tensor([[1, 2, 0], [3, 1, 1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    found = ran(module, batch, embeddings=True)
    rows = module.embed.weight.detach().numpy().astype(F64)[[1, 2, 3, 1, 1]]
    np.testing.assert_allclose(found["lin.weight"].mean().numpy(), rows.T @ rows / 5, rtol=1e-6)
    assert found["embed.weight"].gram.tolist() == [0, 3, 1, 1]
    assert "embed.weight" not in ran(module, batch)


def test_kernels_see_patches() -> None:
    """The inputs of a convolution are the patches under its kernel; strides and padding count."""
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    conv = torch.nn.Conv2d(3, 2, (2, 3), stride=(2, 1), padding=1, bias=False)
    gram = ran(conv, (x,))["weight"].mean()
    padded = np.pad(x.numpy().astype(F64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.array(
        [
            padded[b, :, i : i + 2, j : j + 3].reshape(-1)
            for b in range(2)
            for i in range(0, 6, 2)
            for j in range(4)
        ]
    )
    np.testing.assert_allclose(
        gram.numpy(), patches.T @ patches / len(patches), rtol=1e-5, atol=1e-7
    )
    line = torch.nn.Conv1d(3, 2, 2, bias=False)
    signal = x[:, :, 0, :]
    windows = np.array(
        [signal[b, :, j : j + 2].numpy().reshape(-1) for b in range(2) for j in range(3)], F64
    )
    gram = ran(line, (signal,))["weight"].mean()
    np.testing.assert_allclose(gram.numpy(), windows.T @ windows / 6, rtol=1e-5, atol=1e-7)


def test_tied_heads_and_groups_are_left_out() -> None:
    """A weight that is looked up and multiplied, and convolutions of several groups."""
    module = Masked()
    head = torch.nn.Linear(3, 4, bias=False)
    head.weight = module.embed.weight
    module.head = head
    module.grouped = torch.nn.Conv1d(2, 2, 1, groups=2)
    assert set(linear_weights(module, embeddings=True).values()) == {"lin.weight"}


def forward(values: dict[str, Any], x: np.ndarray, blocks: int) -> np.ndarray:
    """What reaches a block of the network."""
    for block in range(blocks):
        place = f"layers.{block}.lin"
        x = np.tanh(x @ values[f"{place}.weight"].T.astype(F64) + values[f"{place}.bias"])
    return x


def inputs_of(seed: int) -> np.ndarray:
    """All inputs of the task."""
    return np.concatenate([b["x"].numpy() for b in task_of(seed).scorer.batches("val")]).astype(F64)


@pytest.fixture
def networks(tmp_path: Path) -> list[Path]:
    """Three models of the network."""
    return [save_network(tmp_path / f"ft{seed}", seed) for seed in (1, 2, 3)]


def saved(made: Statistics, place: Path) -> Path:
    """Written to a file."""
    save(made, place)
    return place


def test_files_are_what_was_collected(networks: list[Path], tmp_path: Path) -> None:
    """Names of the checkpoint, float32, and what they are about; they merge by streaming."""
    files = []
    for seed, path in enumerate(networks, start=1):
        with make(only(str(path)), "model") as candidate:
            made = collect(candidate, "gram", [task_of(seed)], How())
        files.append(saved(made, tmp_path / f"{seed}.safetensors"))
        opened = open_collected(str(files[-1]))
        assert opened.kind == "gram"
        assert opened.about["rows"]["head.weight"] == 12
        assert opened.about["tasks"][0]["name"] == f"data{seed}"
        wanted = {}
        for block, name in enumerate(("layers.0.lin.weight", "layers.1.lin.weight", "head.weight")):
            x = forward(values_of(seed), inputs_of(seed), block)
            wanted[name] = x.T @ x / 12
        assert_close(made.tensors, wanted, 1e-5)
    got = merge_models(networks, method="regmean", statistics=files, alpha=0.9)
    name = "head.weight"
    grams = [np.asarray(open_collected(str(f)).tensors[name].read(0, 9), F64) for f in files]
    grams = [0.9 * g.reshape(3, 3) + 0.1 * np.diag(np.diag(g.reshape(3, 3))) for g in grams]
    right = sum(values_of(s)[name] @ g for s, g in enumerate(grams, start=1))
    np.testing.assert_allclose(got[name], right @ np.linalg.inv(sum(grams)), rtol=1e-5, atol=1e-6)
    bias = "layers.1.lin.bias"
    mean = np.mean([values_of(seed)[bias] for seed in (1, 2, 3)], axis=0)
    np.testing.assert_allclose(got[bias], mean, rtol=1e-6)


def solved(weights: list[np.ndarray], grams: list[np.ndarray], alpha: float) -> np.ndarray:
    """RegMean by its normal equations."""
    own = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
    right = sum(w.astype(F64) @ g for w, g in zip(weights, own, strict=True))
    found: np.ndarray = np.linalg.solve(sum(own), right.T).T
    return found


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_inputs_through_merged_blocks(
    networks: list[Path], tmp_path: Path, order: tuple[int, ...]
) -> None:
    """RegMean++ block by block: inputs from merged blocks, into each model's own block."""
    alpha, paths = 0.8, [networks[seed - 1] for seed in order]
    recipe = recipe_of(*paths, method="linear", form="model")
    with make(recipe, "mean") as candidate:
        made = collect_through(candidate, [[task_of(seed)] for seed in order], How(), alpha=alpha)
    models = [values_of(seed) for seed in order]
    merged: dict[str, Any] = {n: np.mean([m[n] for m in models], axis=0) for n in models[0]}
    for block, name in enumerate(("layers.0.lin.weight", "layers.1.lin.weight", "head.weight")):
        reached = [forward(merged, inputs_of(seed), block) for seed in order]
        grams = [x.T @ x / 12 for x in reached]
        for each, gram in zip(made, grams, strict=True):
            np.testing.assert_allclose(each.tensors[name], gram, rtol=1e-4, atol=1e-6)
        merged[name] = solved([m[name] for m in models], grams, alpha)
    files = [saved(each, tmp_path / f"{i}.safetensors") for i, each in enumerate(made)]
    got = merge_models(paths, method="regmean_pp", statistics=files, alpha=alpha)
    assert_close(got, merged, 1e-4)
    # They hold for this merge alone.
    for change in ({"alpha": 0.9}, {"models": paths[:2]}):
        given: Any = {"models": paths, "alpha": alpha} | change
        with pytest.raises(MergebenchError, match="blocks merged with other"):
            merge_models(
                given["models"], method="regmean_pp", alpha=given["alpha"],
                statistics=files[: len(given["models"])],
            )  # fmt: skip


def test_layers_inside_of_a_block_have_its_own_inputs(tmp_path: Path) -> None:
    """Within a block a model's second layer is fed by its own first one, not by the merged one."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pair = {"up": torch.nn.Linear(2, 2, bias=False), "down": torch.nn.Linear(2, 2, False)}
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict(pair)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layers[0]["down"](self.layers[0]["up"](x))
            return found

    random = np.random.default_rng(5)
    x = random.normal(size=(7, 2)).astype(np.float32)
    names = ("layers.0.up.weight", "layers.0.down.weight")
    models = [{n: random.normal(size=(2, 2)).astype(np.float32) for n in names} for _ in range(2)]
    places = []
    for index, model in enumerate(models):
        places.append(tmp_path / f"m{index}")
        places[-1].mkdir()
        write(places[-1] / "model.safetensors", model)
    task = Task("t", Runs(Block(), [(torch.from_numpy(x),)]), "t")
    recipe = recipe_of(*places, method="linear", form="model")
    with make(recipe, "mean") as candidate:
        made = collect_through(candidate, [[task], [task]], How(), alpha=0.95)
    for model, each in zip(models, made, strict=True):
        inside = x.astype(F64) @ model[names[0]].T
        np.testing.assert_allclose(each.tensors[names[1]], inside.T @ inside / 7, rtol=1e-5)


def test_what_cannot_be_collected(networks: list[Path]) -> None:
    """Scorers without data, without classes, empty splits, and modules without linear layers."""
    command = Task("c", object(), "c")
    with make(only(str(networks[0])), "model") as candidate:
        candidate.arrays()
        with pytest.raises(ParameterError, match="task c: has no data"):
            fisher_of(Logistic(W), [command], "val")
        plain = Task("p", Runs(Logistic(W), [(torch.ones(1, 2), 0)]), "p")
        with pytest.raises(ParameterError, match="logits"):
            fisher_of(Logistic(W), [plain], "val")
        with pytest.raises(ParameterError, match="split 'val' is empty"):
            grams_of(Masked(), [Task("e", Runs(Masked(), []), "e")], "val")
    uneven = Task(
        "u", Classes(Logistic(W), [{"x": torch.ones(2, 2), "labels": torch.ones(3)}]), "u"
    )
    with pytest.raises(ParameterError, match="first dimension"):
        fisher_of(Logistic(W), [uneven], "val")
    broken = Logistic(np.full((3, 2), np.nan, np.float32))
    with pytest.raises(MergebenchError, match="gradient of 'w' is not finite"):
        fisher_of(broken, [classes(6)], "val", labels="true")
