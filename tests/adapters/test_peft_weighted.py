"""PEFT's ``add_weighted_adapter`` beside ours: equal in ΔW where PEFT merges ΔW, and where not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from mergebench import merge_models
from mergebench.core.tensor import Array

from .support import load_folder, read_values

WEIGHTS = (0.7, -1.5, 2.0)
Update = dict[str, Array]


class Net(nn.Module):
    """Two linear layers, neither of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)


def adapters(folder: Path, ranks: tuple[int, ...] = (3, 3), **settings: object) -> PeftModel:
    """A model with adapters ``0``, ``1`` … of these ranks, each saved in a folder of its name."""
    torch.manual_seed(4)
    model: PeftModel | None = None
    for index, rank in enumerate(ranks):
        config = LoraConfig(
            r=rank, lora_alpha=5, target_modules=["up", "down"], init_lora_weights=False, **settings
        )
        if model is None:
            model = get_peft_model(Net(), config, adapter_name="0")
        else:
            model.add_adapter(str(index), config)
    assert model is not None
    model.save_pretrained(folder)
    return model


def of_peft(
    model: PeftModel, folder: Path, weights: tuple[float, ...], how: str, **options: object
) -> Update:
    """ΔW of what PEFT makes of the adapters, as a process that loads it sees it."""
    names = [str(index) for index in range(len(weights))]
    model.add_weighted_adapter(names, list(weights), "merged", how, **options)
    model.save_pretrained(folder, selected_adapters=["merged"])
    return read_values(load_folder(folder / "merged"))


def of_ours(
    folder: Path, weights: tuple[float, ...], method: str = "task_arithmetic", **options: object
) -> Update:
    """ΔW of our merge of the same files."""
    models = [(folder / str(index), weight) for index, weight in enumerate(weights)]
    return merge_models(models, method=method, form="delta", **options)


def assert_equal(got: Update, expected: Update, to: float = 1e-5) -> None:
    """Every ΔW within ``to`` of its norm."""
    assert set(got) == set(expected) == {"up.weight", "down.weight"}
    for name, array in expected.items():
        assert np.linalg.norm(got[name] - array) <= to * np.linalg.norm(array), name


def apart(got: Update, expected: Update) -> float:
    """The least relative error of any ΔW."""
    return min(
        float(np.linalg.norm(got[name] - array) / np.linalg.norm(array))
        for name, array in expected.items()
    )


@pytest.mark.parametrize("ranks", [(3, 3), (2, 4), (1, 3, 2)])
def test_cat_is_the_sum(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    """``cat`` concatenates factors, and so do we: Σ w ΔW, whatever the ranks."""
    weights = WEIGHTS[: len(ranks)]
    theirs = of_peft(adapters(tmp_path, ranks), tmp_path, weights, "cat")
    assert_equal(of_ours(tmp_path, weights), theirs)
    # As an adapter too.
    models = [(tmp_path / str(index), weight) for index, weight in enumerate(weights)]
    merge_models(models, method="task_arithmetic", out=tmp_path / "ours")
    assert_equal(read_values(load_folder(tmp_path / "ours")), theirs)


@pytest.mark.parametrize(("ranks", "kept"), [((3, 3), 6), ((3, 3), 2), ((2, 4), 4), ((2, 4), 1)])
def test_svd_is_the_truncated_sum(tmp_path: Path, ranks: tuple[int, ...], kept: int) -> None:
    """``svd`` is the best approximation of Σ w ΔW of a rank: exact at the summed one."""
    weights = WEIGHTS[: len(ranks)]
    theirs = of_peft(adapters(tmp_path, ranks), tmp_path, weights, "svd", svd_rank=kept)
    assert_equal(of_ours(tmp_path, weights, then=[f"truncate:rank={kept}"]), theirs)
    whole = of_ours(tmp_path, weights)
    if kept == sum(ranks):
        assert_equal(whole, theirs)
    else:
        assert apart(whole, theirs) > 0.1


def test_linear_on_factors_has_cross_terms(tmp_path: Path) -> None:
    """``linear`` adds √|w s| B and √|w s| A, so that BᵢAⱼ come in: another update than Σ w ΔW."""
    weights = (0.7, 1.5)
    model = adapters(tmp_path)
    theirs = of_peft(model, tmp_path, weights, "linear")
    whole = of_ours(tmp_path, weights)
    assert apart(whole, theirs) > 0.3
    layers = {"up.weight": model.base_model.model.up, "down.weight": model.base_model.model.down}
    crossed = {}
    for name, layer in layers.items():
        roots = [(weight * layer.scaling[str(i)]) ** 0.5 for i, weight in enumerate(weights)]
        A, B = (
            sum(root * pair[str(i)].weight.detach().double() for i, root in enumerate(roots))
            for pair in (layer.lora_A, layer.lora_B)
        )
        crossed[name] = (B @ A).numpy()
    assert_equal(theirs, crossed)


def turned(model: PeftModel, folder: Path) -> PeftModel:
    """The same updates from factors in another basis: B M and M⁻¹ A of the first adapter."""
    random = np.random.default_rng(0)
    M = torch.tensor(np.linalg.qr(random.normal(size=(3, 3)))[0], dtype=torch.float32)
    with torch.no_grad():
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.lora_B["0"].weight.copy_(layer.lora_B["0"].weight @ M)
            layer.lora_A["0"].weight.copy_(M.T @ layer.lora_A["0"].weight)
    folder.mkdir()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("how", ["ties", "linear", "magnitude_prune"])
def test_factors_depend_on_their_basis(tmp_path: Path, how: str) -> None:
    """PEFT's merges of factors change with the basis of one adapter; ours, of ΔW, do not."""
    weights, density = (0.7, 1.5), {} if how == "linear" else {"density": 0.5}
    theirs = of_peft(adapters(tmp_path), tmp_path, weights, how, **density)
    ours = {"linear": "task_arithmetic"}.get(how, how)
    before = of_ours(tmp_path, weights, ours, **density)
    other = turned(adapters(tmp_path), tmp_path / "turned")
    moved = of_peft(other, tmp_path / "turned", weights, how, **density)
    assert apart(moved, theirs) > 0.1
    assert_equal(of_ours(tmp_path / "turned", weights, ours, **density), before, 1e-4)
    assert apart(before, theirs) > 0.3


def test_ties_on_updates_agrees(tmp_path: Path) -> None:
    """``ties_svd`` and ``magnitude_prune_svd`` merge ΔW: the presets ``peft-0.21`` of ours."""
    weights = (0.7, 1.5)
    for how, method in (("magnitude_prune_svd", "magnitude_prune"), ("ties_svd", "ties")):
        model = adapters(tmp_path)
        theirs = of_peft(model, tmp_path, weights, how, svd_rank=6, density=0.5)
        ours = of_ours(tmp_path, weights, method, density=0.5, compat="peft-0.21")
        assert_equal(ours, theirs, 1e-4)


def test_rank_stabilised_sources(tmp_path: Path) -> None:
    """Of rsLoRA sources PEFT's ``cat`` is √(summed rank) too large; ours is the sum."""
    weights = (0.7, 1.5)
    model = adapters(tmp_path, use_rslora=True)
    whole = {
        name: sum(
            weight * layer.get_delta_weight(str(i)).detach().double().numpy()
            for i, weight in enumerate(weights)
        )
        for name, layer in (
            ("up.weight", model.base_model.model.up),
            ("down.weight", model.base_model.model.down),
        )
    }
    assert_equal(of_ours(tmp_path, weights), whole)
    theirs = of_peft(model, tmp_path, weights, "cat")
    assert_equal(theirs, {name: 6**0.5 * array for name, array in whole.items()})
