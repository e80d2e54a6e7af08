"""Adapters made and saved by PEFT mean the same to us as to PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from mergebench.adapters_zoo.adapter import CONFIG_KEY, AdapterSource, ReadOptions, read_adapter
from mergebench.core.delta import Dense, LowRank, Replacement
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import Array

from .support import (
    assert_close,
    assert_same_update,
    load_folder,
    read_values,
    source_of,
    to_numpy,
    values_of,
)

pytestmark = [
    # PEFT reads an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT takes the one-dimensional bias of B for an ungathered shard.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape:Warning"),
    # That PEFT saves adapted embeddings together with the base's is what one test is about.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


class Block(nn.Module):
    """Layers of every type, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)
        self.conv = nn.Conv2d(3, 4, 3)
        self.point = nn.Conv2d(4, 5, 1)
        self.seq = nn.Conv1d(3, 4, 5)
        self.volume = nn.Conv3d(2, 3, 2)
        self.norm = nn.LayerNorm(6)


class Net(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))


class TransposedNet(nn.Module):
    """GPT-2's layers, stored input x output; one of them is square."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv1D(7, 5)
        self.second = Conv1D(5, 5)


CASES: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["up", "down"], "r": 3, "lora_alpha": 5},
    "embedding": {"target_modules": ["embed"], "r": 2, "lora_alpha": 7},
    "conv2d": {"target_modules": ["conv"], "r": 2, "lora_alpha": 3},
    "conv2d-1x1": {"target_modules": ["point"], "r": 3, "lora_alpha": 2},
    "conv1d": {"target_modules": ["seq"], "r": 2, "lora_alpha": 3},
    "conv3d": {"target_modules": ["volume"], "r": 2, "lora_alpha": 3},
    "patterns": {
        "target_modules": ["up", "down", "conv"],
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {r"blocks\.0\.up": 3, "up": 5, "co.*": 4},
        "alpha_pattern": {r"blocks\.[01]\.up": 11, "down|conv": 13},
    },
    "rslora": {
        "target_modules": ["up", "embed", "conv"],
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"up": 3},
        "alpha_pattern": {"0.up": 5},
    },
    "modules_to_save": {
        "target_modules": ["up"],
        "r": 2,
        "lora_alpha": 5,
        "modules_to_save": ["head", "norm"],
    },
    "bias-all": {"target_modules": ["up", "conv"], "r": 2, "lora_alpha": 3, "bias": "all"},
    "bias-lora-only": {
        "target_modules": ["up", "conv"],
        "r": 2,
        "lora_alpha": 3,
        "bias": "lora_only",
    },
    "lora-bias": {"target_modules": ["up", "conv"], "r": 2, "lora_alpha": 3, "lora_bias": True},
    "everything": {
        "target_modules": ["up", "down", "conv", "point", "seq", "volume", "embed"],
        "r": 2,
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {"embed": 4},
        "modules_to_save": ["head"],
        "bias": "all",
    },
}


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """The model with every trainable parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def state_of(model: nn.Module) -> dict[str, Array]:
    """Every tensor of a model; floating ones are in float64 after ``.double()``."""
    return {name: to_numpy(value).astype(np.float64) for name, value in model.state_dict().items()}


def trained(
    net: nn.Module, folder: Path, **options: Any
) -> tuple[AdapterSource, dict[str, Array], dict[str, Array]]:
    """A saved adapter with random factors; the base and PEFT's merge of both, in float64."""
    base = state_of(copy.deepcopy(net).double())
    model = randomised(peft.get_peft_model(net, peft.LoraConfig(**options)), seed=1)
    model.save_pretrained(folder)
    merged = state_of(model.double().merge_and_unload())
    return load_folder(folder), base, merged


@pytest.mark.parametrize("name", CASES)
def test_reads_what_peft_merges(name: str, tmp_path: Path) -> None:
    """Without a base, names and numbers are those of PEFT's merged model."""
    source, base, merged = trained(Net(), tmp_path, **CASES[name])

    assert_same_update(read_adapter(source), base, merged)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prefix", ["", "model.", "a.b."])
def test_reads_into_a_base(name: str, prefix: str, tmp_path: Path) -> None:
    """With a base, tensors get its names, whatever stands before them."""
    source, base, merged = trained(Net(), tmp_path, **CASES[name])
    shapes = {prefix + key: value.shape for key, value in base.items()}
    vector = read_adapter(source, ReadOptions(base_shapes=shapes))
    deltas = {key.removeprefix(prefix): delta for key, delta in vector.items()}

    assert set(vector) <= set(shapes)
    assert_same_update(deltas, base, merged)


def test_reads_into_a_base_of_shorter_names(tmp_path: Path) -> None:
    """The adapter may have been trained on a wrapper of the base."""
    wrapper = nn.ModuleDict({"bert": Net()})
    source, base, merged = trained(wrapper, tmp_path, **CASES["linear"])
    shapes = {key.removeprefix("bert."): value.shape for key, value in base.items()}
    vector = read_adapter(source, ReadOptions(base_shapes=shapes))

    assert_same_update({f"bert.{key}": delta for key, delta in vector.items()}, base, merged)


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "lora-bias"])
def test_delta_weight_of_peft(name: str, tmp_path: Path) -> None:
    """Each low-rank delta is PEFT's ``get_delta_weight``."""
    model = randomised(peft.get_peft_model(Net(), peft.LoraConfig(**CASES[name])), seed=2)
    model.save_pretrained(tmp_path)
    values = read_values(load_folder(tmp_path))
    checked = 0
    for path, layer in model.double().base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            expected = to_numpy(layer.get_delta_weight("default"))
            assert_close(values[f"{path}.weight"], expected)
            checked += 1

    assert checked == {"linear": 4, "embedding": 1, "conv2d": 2, "lora-bias": 4}[name]


@pytest.mark.parametrize("name", ["everything", "lora-bias"])
def test_names_with_the_adapters_name(name: str, tmp_path: Path) -> None:
    """Raw state dicts, in which PEFT has not yet removed the adapter's name, mean the same."""
    model = randomised(peft.get_peft_model(Net(), peft.LoraConfig(**CASES[name])), seed=3)
    model.save_pretrained(tmp_path)
    saved = load_folder(tmp_path)
    kept = ("lora_", "modules_to_save.default", ".bias")
    raw = {
        key: to_numpy(value)
        for key, value in model.state_dict().items()
        if any(part in key for part in kept) and "original_module" not in key
    }
    if name == "lora-bias":
        raw = {key: value for key, value in raw.items() if "lora_" in key}
    expected, got = read_values(saved), read_values(source_of(raw, saved.config))

    assert any(".default" in key for key in raw)
    assert got.keys() == expected.keys()
    for tensor, value in expected.items():
        assert_close(got[tensor], value, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors(dtype: torch.dtype, tmp_path: Path) -> None:
    """Factors stay as stored; only their product is computed, in the caller's precision."""
    source, base, merged = trained(Net().to(dtype), tmp_path, **CASES["linear"])

    assert_same_update(read_adapter(source), base, merged)


def test_conv1d_layers(tmp_path: Path) -> None:
    """Weights stored input x output, one of them square, with and without the base's shapes."""
    options = {"target_modules": ["first", "second"], "r": 2, "lora_alpha": 3}
    source, base, merged = trained(TransposedNet(), tmp_path, fan_in_fan_out=True, **options)
    shapes = {key: value.shape for key, value in base.items()}

    assert_same_update(read_adapter(source), base, merged)
    assert_same_update(read_adapter(source, ReadOptions(base_shapes=shapes)), base, merged)


def test_shapes_outweigh_a_wrong_fan_in_fan_out(tmp_path: Path) -> None:
    """A weight that is not square shows how it is stored; a square one then needs to be told."""
    options = {"target_modules": ["first", "second"], "r": 2, "lora_alpha": 3}
    source, base, merged = trained(TransposedNet(), tmp_path, fan_in_fan_out=True, **options)
    shapes = {key: value.shape for key, value in base.items()}
    wrong = dict(source.config or {}, fan_in_fan_out=False)
    tensors = source.tensors
    first = {key: tensor for key, tensor in tensors.items() if "first" in key}
    partial = AdapterSource("toy", first, wrong, {})
    known = ReadOptions(base_shapes=shapes, transposed=frozenset({"first.weight", "second.weight"}))

    vector = read_adapter(partial, ReadOptions(base_shapes=shapes))
    assert_close(values_of(vector["first.weight"]), merged["first.weight"] - base["first.weight"])
    with pytest.raises(MismatchError, match=r"second\.weight is square.*wrong for first\.weight"):
        read_adapter(AdapterSource("toy", tensors, wrong, {}), ReadOptions(base_shapes=shapes))
    assert_same_update(read_adapter(AdapterSource("toy", tensors, wrong, {}), known), base, merged)


def test_gpt2(tmp_path: Path) -> None:
    """A real architecture of Conv1D layers, into a base without the head's prefix."""
    torch.manual_seed(0)
    net = GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=8,
            n_head=2,
            vocab_size=13,
            n_positions=4,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    source, base, merged = trained(
        net,
        tmp_path,
        target_modules=["c_attn", "c_proj", "c_fc", "wte"],
        r=2,
        lora_alpha=3,
        fan_in_fan_out=True,
    )
    bare = {
        key.removeprefix("transformer."): value.shape
        for key, value in base.items()
        if key != "lm_head.weight"
    }
    vector = read_adapter(source, ReadOptions(base_shapes=bare))
    body = {key: value for key, value in base.items() if key != "lm_head.weight"}
    expected = {key: value for key, value in merged.items() if key in body}

    assert len(vector) == 9
    assert_same_update(
        {f"transformer.{key}": delta for key, delta in vector.items()}, body, expected
    )


def test_saved_base_embeddings_are_a_choice(tmp_path: Path) -> None:
    """PEFT saves the base's embedding beside its factors; that it is the base's is not assumed."""
    torch.manual_seed(0)
    net = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=13,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    source, base, merged = trained(
        net, tmp_path, target_modules=["embed_tokens", "q_proj"], r=2, lora_alpha=3
    )
    shapes = {key: value.shape for key, value in base.items()}

    assert "base_model.model.model.embed_tokens.base_layer.weight" in source.tensors
    with pytest.raises(FormatError, match=r"embed_tokens\.base_layer\.weight.*--ignore-saved-base"):
        read_adapter(source)
    options = ReadOptions(base_shapes=shapes, ignore_saved_base=True)
    assert_same_update(read_adapter(source, options), base, merged)


def test_resized_embeddings_are_replacements(tmp_path: Path) -> None:
    """Embeddings saved because the vocabulary grew hold values, declared nowhere."""
    source, _, _ = trained(Net(), tmp_path, **CASES["linear"])
    table = np.arange(12.0).reshape(6, 2)
    arrays = {"base_model.model.embed.weight": table, "base_model.model.lm_head.weight": table}
    tensors = {**source.tensors, **source_of(arrays).tensors}
    vector = read_adapter(AdapterSource("toy", tensors, source.config, {}))

    for name in ("embed.weight", "lm_head.weight"):
        assert isinstance(vector[name], Replacement)
        assert_close(values_of(vector[name]), table, 0)


def test_kinds_of_deltas_and_metadata(tmp_path: Path) -> None:
    """Factors stay factors, values stay values, and the config travels along."""
    source, _, _ = trained(Net(), tmp_path, **CASES["modules_to_save"])
    vector = read_adapter(source)
    types = {name: type(delta) for name, delta in vector.items()}

    assert types["blocks.0.up.weight"] is LowRank
    assert types["blocks.1.norm.bias"] is Replacement
    assert types["head.1.num_batches_tracked"] is Replacement
    assert json.loads(vector.metadata[CONFIG_KEY]) == source.config
    assert vector.metadata["kind"] == "lora"
    assert vector.label == "toy"
    assert list(vector) == sorted(vector, key=lambda name: (types[name] is Replacement, name))


def test_lora_bias_is_dense_and_lazy(tmp_path: Path) -> None:
    """The bias of B, scaled, lands in a caller's buffer as in a fresh array."""
    source, _, _ = trained(Net(), tmp_path, **CASES["lora-bias"])
    delta = read_adapter(source)["blocks.0.up.bias"]
    assert isinstance(delta, Dense)
    stored = source.tensors["base_model.model.blocks.0.up.lora_B.bias"].read(0, 10)
    buffer = np.zeros(100, np.uint8)
    got = delta.values.read(2, 7, buffer)

    assert delta.values.dtype == "F32"
    assert got.tolist() == (stored[2:7].astype(np.float64) * 1.5).astype(np.float32).tolist()
    assert np.array_equal(buffer[:20].view(np.float32), got)
    assert not buffer[20:].any()
