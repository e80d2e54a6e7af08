"""PEFT opens merged adapters, and ΔW is Σ wᵢ ΔWᵢ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.helpers.compare import assert_close
from tests.helpers.running import assert_done, call

# transformers deprecates what PEFT calls, and GPT-2's embedding makes PEFT save it on its own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
WEIGHTS = (0.3, -1.5)


class Mixed(nn.Module):
    """A convolution, an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.conv = nn.Conv2d(4, 8, (3, 2))
        self.proj = nn.Linear(6, 10)


class Table(nn.Module):
    """An embedding whose name does not say so, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.proj = nn.Linear(6, 10)


def llama() -> nn.Module:
    """A small Llama."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def gpt2() -> nn.Module:
    """A small GPT-2, whose weights are stored input × output."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


#: Builder, and the settings of both adapters.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "ranks and alphas": (
        llama,
        {"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 8},
        {"target_modules": ["q_proj", "up_proj"], "r": 6, "lora_alpha": 3},
    ),
    "other modules": (
        llama,
        {"target_modules": ["q_proj", "up_proj"], "r": 4},
        {"target_modules": ["q_proj", "down_proj"], "r": 2},
    ),
    "rank-stabilised": (
        llama,
        {"target_modules": ["v_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True},
        {"target_modules": ["v_proj"], "r": 8, "lora_alpha": 6},
    ),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 3},
            "alpha_pattern": {"q_proj": 5},
        },
        {"target_modules": ["q_proj", "down_proj"], "r": 2, "alpha_pattern": {r".*\.1\..*": 9}},
    ),
    "fan in, fan out": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True},
        {"target_modules": ["c_attn"], "r": 3, "lora_alpha": 5, "fan_in_fan_out": True},
    ),
    "embedding and convolution": (
        Mixed,
        {"target_modules": ["embed", "conv", "proj"], "r": 4, "lora_alpha": 3},
        {"target_modules": ["embed", "conv"], "r": 2, "use_rslora": True},
    ),
    "embedding of another name": (
        Table,
        {"target_modules": ["table"], "r": 3},
        {"target_modules": ["table"], "r": 2, "lora_alpha": 3},
    ),
    "embedding of a language model": (
        llama,
        {"target_modules": ["embed_tokens", "q_proj"], "r": 4},
        {"target_modules": ["embed_tokens"], "r": 5, "lora_alpha": 2},
    ),
}


def make_adapter(base: nn.Module, folder: Path, seed: int, settings: dict[str, Any]) -> None:
    """An adapter with random factors, saved by PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)


def updates(base: nn.Module, folder: Path) -> dict[str, np.ndarray]:
    """ΔW by module as PEFT computes it, in float64."""
    model = PeftModel.from_pretrained(copy.deepcopy(base).double(), folder)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.r:
            with torch.no_grad():
                found[name] = module.get_delta_weight("default").double().numpy()
    return found


def combined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Σ wᵢ ΔWᵢ by module."""
    total: dict[str, np.ndarray] = {}
    for weight, part in zip(WEIGHTS, parts, strict=True):
        for name, update in part.items():
            total[name] = total.get(name, 0.0) + weight * update
    return total


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    """A base with two adapters in a fresh folder."""
    build, *settings = CASES[request.param]
    torch.manual_seed(0)
    base = build()
    for number, each in enumerate(settings):
        make_adapter(base, tmp_path / f"lora{number}", number, each)
    return base


@pytest.mark.parametrize(
    "preset", [("-m", "task_arithmetic"), ("-m", "linear", "-p", "normalize=false")]
)
def test_merged_adapter_in_peft(case: nn.Module, tmp_path: Path, preset: tuple[str, ...]) -> None:
    """The merged folder opens in PEFT, with the weighted sum of the updates in every module."""
    models = [f"lora{number}:{weight}" for number, weight in enumerate(WEIGHTS)]
    common = ("--ignore-saved-base", "-o", "out")
    assert_done(call("merge", *models, *preset, *common, cwd=tmp_path))

    parts = [updates(case, tmp_path / f"lora{number}") for number in range(2)]
    assert_close(updates(case, tmp_path / "out"), combined(parts))


def test_swept_adapters_in_peft(case: nn.Module, tmp_path: Path) -> None:
    """Every output of a sweep is an adapter of its own."""
    models = [f"lora{number}:{weight}" for number, weight in enumerate(WEIGHTS)]
    sweep = ("-m", "task_arithmetic", "-p", "lam=0.5,2", "--ignore-saved-base")
    assert_done(call("merge", *models, *sweep, "-o", "out", cwd=tmp_path))

    parts = [updates(case, tmp_path / f"lora{number}") for number in range(2)]
    for value in (0.5, 2):
        expected = {name: value * update for name, update in combined(parts).items()}
        assert_close(updates(case, tmp_path / "out" / f"lam={value}"), expected)


@pytest.mark.parametrize("kind", ["ranks and alphas", "fan in, fan out", "patterns"])
def test_merged_into_the_base(tmp_path: Path, kind: str) -> None:
    """With --base the weights are those that PEFT merges, and the adapter form knows the base."""
    build, *settings = CASES[kind]
    torch.manual_seed(0)
    base = build()
    base.save_pretrained(tmp_path / "base")
    for number, each in enumerate(settings):
        make_adapter(base, tmp_path / f"lora{number}", number, each)
    models = [f"lora{number}:{weight}" for number, weight in enumerate(WEIGHTS)]
    common = ("merge", *models, "-b", "base", "-m", "task_arithmetic")
    assert_done(call(*common, "-o", "model", cwd=tmp_path))
    assert_done(call(*common, "--as", "lora", "-o", "lora", cwd=tmp_path))

    expected = combined([updates(base, tmp_path / f"lora{number}") for number in range(2)])
    assert_close(updates(base, tmp_path / "lora"), expected)
    merged = dict(type(base).from_pretrained(tmp_path / "model").named_parameters())
    start = dict(base.named_parameters())
    moved = {
        name: start[f"{name}.weight"].detach().double().numpy() + update
        for name, update in expected.items()
    }
    assert_close({name: merged[f"{name}.weight"].detach().numpy() for name in moved}, moved)
    still = [name for name in start if name.removesuffix(".weight") not in moved]
    assert all(torch.equal(merged[name], start[name]) for name in still)
