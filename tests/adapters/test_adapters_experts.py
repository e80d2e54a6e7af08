"""LoRA on parameters that stack experts, made and merged by PEFT."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions, read_adapter
from mergebench.core.delta import Delta, LowRank
from mergebench.core.errors import FormatError, MergebenchError, MismatchError
from mergebench.core.tensor import Array, ArrayTensor

from .support import assert_close, assert_same_update, load_folder, to_numpy, values_of
from .test_adapters_peft import randomised, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT compares patterns with modules only, although it applies them to parameters.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not:RuntimeWarning"),
]


class Experts(nn.Module):
    """Three experts; the parameters are not in the order of their names."""

    def __init__(self, *, transposed: bool, square: bool) -> None:
        super().__init__()
        size = 4 if square else 5
        self.is_transposed = transposed
        self.gate_up_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, size))
        self.alone = nn.Parameter(torch.randn(7, 2))


class Net(nn.Module):
    """Stacks under a linear layer that has a plain LoRA."""

    def __init__(self, *, transposed: bool = False, square: bool = False) -> None:
        super().__init__()
        self.first = nn.Module()
        self.first.experts = Experts(transposed=transposed, square=square)
        self.second = nn.Module()
        self.second.experts = Experts(transposed=transposed, square=square)
        self.lin = nn.Linear(4, 5)


ALL = ["experts.gate_up_proj", "experts.down_proj", "experts.alone"]
CASES: dict[str, dict[str, Any]] = {
    "one": {"target_parameters": ["experts.down_proj"], "target_modules": []},
    "bare name": {"target_parameters": ["down_proj"], "target_modules": ["lin"]},
    "of one module": {"target_parameters": ["second.experts.gate_up_proj"], "target_modules": []},
    "all": {"target_parameters": ALL, "target_modules": ["lin"]},
    "patterns": {
        "target_parameters": ALL,
        "target_modules": ["lin"],
        "rank_pattern": {"experts.down_proj": 3, "lin": 4},
        "alpha_pattern": {"first.experts.gate_up_proj": 7, "alone": 11},
    },
    "rslora": {"target_parameters": ALL, "target_modules": [], "use_rslora": True},
    "weight of a layer": {"target_parameters": ["lin.weight"], "target_modules": []},
}


def trained(
    net: nn.Module, folder: Path, **options: Any
) -> tuple[AdapterSource, dict[str, Array], dict[str, Array]]:
    """A saved adapter with random factors, the base and what PEFT merges, in float64."""
    net = net.double()
    base = state_of(copy.deepcopy(net))
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options})
    model = randomised(peft.get_peft_model(net, config), seed=2).double()
    model.save_pretrained(folder)
    return load_folder(folder), base, state_of(model.merge_and_unload())


def on(base: dict[str, Array], **more: Any) -> ReadOptions:
    """A base of which the shapes are known."""
    return ReadOptions(base_shapes={name: array.shape for name, array in base.items()}, **more)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_merges(case: str, transposed: bool, tmp_path: Path) -> None:
    """Each expert's product, in either orientation, and the plain LoRA beside it."""
    source, base, merged = trained(Net(transposed=transposed), tmp_path, **CASES[case])
    deltas = read_adapter(source, on(base))

    assert_same_update(deltas, base, merged)
    assert all(isinstance(each, LowRank) for each in deltas.values() if len(each.shape) == 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_square_experts(transposed: bool, tmp_path: Path) -> None:
    """Their orientation is that of the stacks beside them, or what the base is known to have."""
    net = Net(transposed=transposed, square=True)
    source, base, merged = trained(net, tmp_path, **CASES["all"])
    assert_same_update(read_adapter(source, on(base)), base, merged)

    source, base, merged = trained(
        Net(transposed=transposed, square=True), tmp_path, **CASES["one"]
    )
    names = frozenset(name for name in base if transposed and "down" in name)
    assert_same_update(read_adapter(source, on(base, transposed=names)), base, merged)
    with pytest.raises(MismatchError, match=r"down_proj holds square matrices.*\(3, 4, 4\)"):
        read_adapter(source, on(base))


def test_tiles_are_parts_of_the_whole(tmp_path: Path) -> None:
    """Any range reads the same entries, across experts too."""
    from mergebench.core.delta import tile

    source, base, _ = trained(Net(), tmp_path, **CASES["one"])
    delta = read_adapter(source, on(base))["first.experts.down_proj"]
    whole = values_of(delta).reshape(-1)
    for start, stop in ((0, 1), (7, 43), (19, 21), (59, 60), (5, 5)):
        part = tile(delta, start, stop, np.dtype(np.float64))
        assert np.array_equal(part, whole[start:stop])


MOE = {
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 13,
}
MODELS: dict[str, nn.Module] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=12)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **MOE, num_experts=12, num_experts_per_tok=2, moe_intermediate_size=6,
            shared_expert_intermediate_size=6,
        )
    ),
}  # fmt: skip


def on_disk(model: nn.Module, folder: Path) -> dict[str, Array]:
    """A model under the names that transformers saves, in float64."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {
            key: to_numpy(file.get_tensor(key)).astype(np.float64)
            for key in file.keys()  # noqa: SIM118
        }


@pytest.mark.parametrize("kind", MODELS)
def test_experts_stored_one_by_one(kind: str, tmp_path: Path) -> None:
    """Checkpoints that hold each expert's own matrices get each expert's part, still factored."""
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    base = on_disk(model, tmp_path / "base")
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"experts.down_proj": 3},
    )  # fmt: skip
    adapted = randomised(peft.get_peft_model(model, config), seed=3).double()
    adapted.save_pretrained(tmp_path / "adapter")
    merged = on_disk(adapted.merge_and_unload(), tmp_path / "merged")
    assert not any("gate_up_proj" in name for name in base)

    deltas = read_adapter(load_folder(tmp_path / "adapter"), on(base))
    assert len(deltas) == 2 * (1 + 3 * 12)
    assert_same_update(deltas, base, merged)
    assert all(isinstance(each, LowRank) for each in deltas.values())


def refused(
    error: type[MergebenchError],
    pattern: str,
    source: AdapterSource,
    options: ReadOptions | None = None,
) -> None:
    """Reading raises exactly this class, with this text."""
    with pytest.raises(error, match=pattern) as caught:
        read_adapter(source, options)
    assert type(caught.value) is error


def test_refusals(tmp_path: Path) -> None:
    """What the file and the base leave open, or contradict, is an error that names it."""
    source, base, _ = trained(Net(), tmp_path, **CASES["all"])
    config = source.config or {}
    refused(FormatError, r"hold many matrices \(.*--base", source)
    refused(FormatError, "target_parameters", replace(source, config=None), on(base))
    entry = {**config, "target_parameters": "experts"}
    refused(FormatError, "target_parameters in .*a list of names", replace(source, config=entry))

    fewer = {name: array for name, array in base.items() if name != "first.experts.alone"}
    pattern = r"first\.experts has factors for 3 parameters, expected 2.*gate_up_proj"
    refused(MismatchError, pattern, source, on(fewer))
    other = base | {"first.experts.alone": np.ones((9, 2))}
    refused(MismatchError, r"factors of first\.experts do not fit.*\(9, 2\)", source, on(other))
    twins = base | {"first.experts.down_proj": base["first.experts.gate_up_proj"]}
    key = "base_model.model.first.experts.{}lora_{}.weight"
    tensors = dict(source.tensors)
    for side in "AB":
        tensors[key.format("base_layer.", side)] = tensors[
            key.format("base_layer.base_layer.", side)
        ]
    doubled = replace(source, tensors=tensors)
    refused(MismatchError, r"in more than one way.*gate_up_proj", doubled, on(twins))
    del tensors[key.format("base_layer.", "A")]
    refused(FormatError, "only one of the factors A and B", doubled, on(twins))
    wrong = replace(source, config={**config, "rank_pattern": {"experts.down_proj": 4}})
    refused(MismatchError, "do not fit its parameters", wrong, on(base))


def test_experts_of_different_shapes(tmp_path: Path) -> None:
    """A base whose experts differ has no stack of them."""
    source, _, _ = trained(Net(), tmp_path, **CASES["one"])
    renamed = {
        key.replace("first.experts", "first.mlp.experts"): tensor
        for key, tensor in source.tensors.items()
        if "first" in key
    }
    shapes = {
        f"first.mlp.experts.{expert}.down_proj.weight": (4, 5 + expert // 2) for expert in range(3)
    }
    odd = replace(source, tensors=renamed)
    refused(
        MismatchError, "experts of first.mlp.experts differ", odd, ReadOptions(base_shapes=shapes)
    )


def test_values_do_not_depend_on_the_dtype(tmp_path: Path) -> None:
    """Factors of 16 bits are multiplied exactly and rounded once."""
    source, base, _ = trained(Net(), tmp_path, **CASES["one"])
    half = {
        name: ArrayTensor(each.read(0, 10**6).reshape(each.shape).astype(np.float16))
        for name, each in source.tensors.items()
    }
    wide = {name: ArrayTensor(each.array.astype(np.float64)) for name, each in half.items()}
    read: list[dict[str, Delta]] = [
        dict(read_adapter(replace(source, tensors=tensors), on(base))) for tensors in (half, wide)
    ]
    for name, delta in read[0].items():
        exact = values_of(read[1][name])
        assert_close(values_of(delta), exact.astype(np.float32).astype(np.float64), 0)
