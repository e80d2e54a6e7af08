"""Adapters of other families than LoRA, made and saved by PEFT, mean the same to us as to PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergebench.adapters_zoo.adapter import ReadOptions, read_adapter
from mergebench.core.delta import LowRank, Replacement
from mergebench.core.tensor import Array, ArrayTensor

from .support import assert_same_update, load_folder
from .test_adapters_peft import randomised, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning"),
]


class Net(nn.Module):
    """Layers that the families can adapt, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6, bias=False)
        self.conv = nn.Conv2d(4, 6, 3)
        self.point = nn.Conv2d(4, 6, 1)
        self.embed = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 3)


class Transposed(nn.Module):
    """A layer that is stored input x output, and a square one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv1D(8, 6)
        self.second = Conv1D(6, 6)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.bias)


LINEAR = ["up", "down"]
CASES: dict[str, peft.PeftConfig] = {
    "loha": peft.LoHaConfig(target_modules=[*LINEAR, "conv"], r=2, alpha=3),
    "loha tucker": peft.LoHaConfig(
        target_modules=["conv", "up"], r=2, alpha=5, use_effective_conv2d=True
    ),
    "loha patterns": peft.LoHaConfig(
        target_modules=LINEAR, r=2, alpha=3, rank_pattern={"up": 3}, alpha_pattern={"down": 7}
    ),
    "lokr full": peft.LoKrConfig(target_modules=[*LINEAR, "conv"], r=4, alpha=3),
    "lokr": peft.LoKrConfig(target_modules=[*LINEAR, "conv", "point"], r=1, alpha=3),
    "lokr both": peft.LoKrConfig(
        target_modules=LINEAR, r=1, alpha=5, decompose_both=True, decompose_factor=4
    ),
    "lokr tucker": peft.LoKrConfig(
        target_modules=["conv"], r=1, alpha=5, use_effective_conv2d=True, decompose_factor=2
    ),
    "ia3": peft.IA3Config(
        target_modules=[*LINEAR, "conv", "point"], feedforward_modules=["down", "point"]
    ),
    "adalora": peft.AdaLoraConfig(
        target_modules=LINEAR, init_r=4, target_r=2, total_step=10, lora_alpha=3
    ),
    "vera": peft.VeraConfig(target_modules=LINEAR, r=4),
    "dora": peft.LoraConfig(
        target_modules=[*LINEAR, "conv", "point", "embed"], r=2, lora_alpha=5, use_dora=True
    ),
    "dora rslora": peft.LoraConfig(
        target_modules=LINEAR, r=3, lora_alpha=5, use_dora=True, use_rslora=True
    ),
    "oft": peft.OFTConfig(target_modules=["up", "down"], oft_block_size=2),
    "oft exact": peft.OFTConfig(
        target_modules=["up", "down"], oft_block_size=2, use_cayley_neumann=False
    ),
    "oft shared": peft.OFTConfig(
        target_modules=["up", "down"], oft_block_size=2, block_share=True,
        num_cayley_neumann_terms=3,
    ),
    "oft conv": peft.OFTConfig(target_modules=["conv"], oft_block_size=6),
    "hra": peft.HRAConfig(target_modules=LINEAR, r=2),
    "hra gram-schmidt": peft.HRAConfig(target_modules=[*LINEAR, "conv"], r=4, apply_GS=True),
    "c3a": peft.C3AConfig(target_modules=LINEAR, block_size=2),
    "miss": peft.MissConfig(target_modules=LINEAR, r=2),
    "miss remainder": peft.MissConfig(target_modules=LINEAR, r=4),
    "shira": peft.ShiraConfig(target_modules=LINEAR, r=2),
}  # fmt: skip
TRANSPOSED: dict[str, peft.PeftConfig] = {
    "ia3": peft.IA3Config(
        target_modules=["first", "second"], feedforward_modules=["second"], fan_in_fan_out=True
    ),
    "vera": peft.VeraConfig(target_modules=["first", "second"], r=4, fan_in_fan_out=True),
    "dora": peft.LoraConfig(
        target_modules=["first", "second"], r=2, use_dora=True, fan_in_fan_out=True
    ),
}
FACTORED = ("adalora", "vera", "miss")


def trained(
    net: nn.Module, config: peft.PeftConfig, folder: Path
) -> tuple[Any, dict[str, Array], dict[str, Array]]:
    """A saved adapter with random parameters; the base and PEFT's merge of both, in float64."""
    net = net.double()
    base = state_of(copy.deepcopy(net))
    model = peft.get_peft_model(net, copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            # AdaLoRA's count of ranks: it is not trained, whatever its flag says.
            parameter.requires_grad = False
    model = randomised(model, seed=1).double()
    model.save_pretrained(folder)
    merged = state_of(model.merge_and_unload())
    return load_folder(folder), base, merged


@pytest.mark.parametrize("name", CASES)
def test_reads_what_peft_merges(name: str, tmp_path: Path) -> None:
    """Base plus our displacement is the model that PEFT merges, tensor by tensor."""
    source, base, merged = trained(Net(), CASES[name], tmp_path)
    tensors = {key: ArrayTensor(array) for key, array in base.items()}
    options = ReadOptions(
        base_shapes={key: array.shape for key, array in base.items()}, base=tensors
    )
    deltas = read_adapter(source, options)
    assert_same_update(deltas, base, merged)
    if name.split(maxsplit=1)[0] in FACTORED:
        assert all(isinstance(delta, LowRank) for delta in deltas.values())


FAMILIES = sorted({name.split(maxsplit=1)[0] for name in CASES} & CASES.keys() | {"lokr full"})


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_trained_in_full_beside_a_family(name: str, tmp_path: Path) -> None:
    """Any tuner of PEFT may save modules: their values come with its own displacements."""
    config = copy.deepcopy(CASES[name])
    config.modules_to_save = ["head"]
    source, base, merged = trained(Net(), config, tmp_path)
    tensors = {key: ArrayTensor(array) for key, array in base.items()}
    options = ReadOptions(
        base_shapes={key: array.shape for key, array in base.items()}, base=tensors
    )
    deltas = read_adapter(source, options)
    assert_same_update(deltas, base, merged)
    assert {"head.weight", "head.bias", "up.weight"} <= deltas.keys()
    assert isinstance(deltas["head.weight"], Replacement)


@pytest.mark.parametrize(("name", "only"), [("oft", "oft_only"), ("vera", "vera_only")])
@pytest.mark.parametrize("every", [True, False])
def test_biases_trained_beside_a_family(name: str, only: str, every: bool, tmp_path: Path) -> None:
    """Biases of all modules, or of the adapted ones, are new values too."""
    config = copy.deepcopy(CASES[name])
    config.bias = "all" if every else only
    source, base, merged = trained(Net(), config, tmp_path)
    tensors = {key: ArrayTensor(array) for key, array in base.items()}
    shapes = {key: array.shape for key, array in base.items()}
    deltas = read_adapter(source, ReadOptions(base_shapes=shapes, base=tensors))
    assert_same_update(deltas, base, merged)
    assert isinstance(deltas["up.bias"], Replacement)
    assert ("head.bias" in deltas) is every


@pytest.mark.parametrize("name", TRANSPOSED)
def test_reads_weights_stored_input_by_output(name: str, tmp_path: Path) -> None:
    """GPT-2's layers, one of them square."""
    source, base, merged = trained(Transposed(), TRANSPOSED[name], tmp_path)
    tensors = {key: ArrayTensor(array) for key, array in base.items()}
    options = ReadOptions(
        base_shapes={key: array.shape for key, array in base.items()}, base=tensors
    )
    assert_same_update(read_adapter(source, options), base, merged)
