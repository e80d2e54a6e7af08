"""``edit extract-lora``: what a fine-tune has moved, as the best LoRA of a rank, loaded by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.running import assert_done, assert_refused, call

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
Weights = dict[str, torch.Tensor]
LAYERS = ("self_attn", "mlp")
STILL = "model.layers.1.mlp.up_proj.weight"


def save(folder: Path, model: LlamaForCausalLM) -> None:
    """A model, and a fine-tune of it: layers by a falling spectrum, all others by noise."""
    model.save_pretrained(folder / "base")
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        step = 0.003 * torch.randn(parameter.shape, generator=random)
        if is_layer(name):
            U, _, Vh = torch.linalg.svd(step, full_matrices=False)
            step = 0.05 * (U * 0.6 ** torch.arange(U.shape[1])) @ Vh
        if name != STILL:
            parameter.data += step
    model.save_pretrained(folder / "tuned")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA with biases in its attention, and its fine-tune."""
    folder = tmp_path_factory.mktemp("extraction")
    torch.manual_seed(0)
    save(folder, LlamaForCausalLM(_config(attention_bias=True)))
    return folder


def _config(**more: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **more,
    )  # fmt: skip


def loaded(place: Path, adapter: str) -> Weights:
    """The model that PEFT makes of the base and the adapter."""
    base = LlamaForCausalLM.from_pretrained(place / "base", dtype=torch.float64)
    merged = peft.PeftModel.from_pretrained(base, place / adapter).double().merge_and_unload()
    return dict(merged.state_dict())


def weights(place: Path, name: str) -> Weights:
    """Of a model on disk, in float64."""
    found = load_file(place / name / "model.safetensors")
    return {key: each.double() for key, each in found.items()}


def is_layer(name: str) -> bool:
    """Whether a tensor is a linear layer's matrix."""
    return any(part in name for part in LAYERS) and name.endswith(".weight")


def assert_best(place: Path, adapter: str, ranks: dict[str, int], residuals: object) -> None:
    """Every layer is the best approximation of its rank, and all else is the fine-tune's."""
    base, tuned, got = (weights(place, "base"), weights(place, "tuned"), loaded(place, adapter))
    assert isinstance(residuals, dict)
    layers = {name for name in base if is_layer(name)}
    assert residuals.keys() == ranks.keys() == layers - {STILL}
    for name, each in tuned.items():
        if name not in ranks:
            assert torch.equal(got[name].float(), each.float()), name
            continue
        U, S, Vh = torch.linalg.svd(each - base[name], full_matrices=False)
        rank = ranks[name]
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert torch.linalg.norm(got[name] - base[name] - best) <= 1e-5 * S[0], name
        lost = torch.linalg.norm(S[rank:]) / torch.linalg.norm(S)
        assert residuals[name] == pytest.approx(float(lost), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("rank", [1, 5, 100])
def test_rank(place: Path, rank: int) -> None:
    """Layers at the rank, or at their own; norms, biases, embedding and head as tuned."""
    command = ("edit", "extract-lora", "tuned", "--base", "base", "--rank", rank, "-o", "out")
    ran = assert_done(call(*command, "-f", "--json", cwd=place)).json["outputs"][0]

    expected = {
        name: min(rank, *each.shape) for name, each in weights(place, "base").items()
        if is_layer(name) and name != STILL
    }  # fmt: skip
    assert ran["ranks"] == expected
    assert_best(place, "out", ran["ranks"], ran["residuals"])
    config = json.loads((place / "out/adapter_config.json").read_text())
    assert {"lm_head", "model.embed_tokens", "model.norm"} <= set(config["modules_to_save"])


@pytest.mark.parametrize("energy", [0.5, 0.95, 0.9999])
def test_energy(place: Path, energy: float) -> None:
    """The least rank of each layer that keeps the share of its squared norm."""
    command = ("edit", "extract-lora", "tuned", "-b", "base", "--energy", energy, "-o", "out")
    ran = assert_done(call(*command, "-f", "--json", cwd=place)).json["outputs"][0]

    base, tuned = weights(place, "base"), weights(place, "tuned")
    for name, rank in ran["ranks"].items():
        squares = torch.linalg.svdvals(tuned[name] - base[name]) ** 2
        kept = torch.cumsum(squares, 0) / squares.sum()
        assert kept[rank - 1] >= energy
        assert rank == 1 or kept[rank - 2] < energy
    assert_best(place, "out", ran["ranks"], ran["residuals"])


def test_what_is_lost_is_said(place: Path) -> None:
    """Layer by layer on the terminal; and what did not move."""
    command = ("edit", "extract-lora", "tuned", "-b", "base", "--rank", "2", "-o", "out", "-f")
    ran = assert_done(call(*command, cwd=place))

    assert "model.layers.0.self_attn.q_proj.weight: rank 2 of 32, lost 0." in ran.out
    assert f"1 tensors are as in the base and left out: {STILL}" in ran.err


def test_embeddings_as_factors_or_not_at_all(place: Path) -> None:
    """They are layers like others, or stay the base's."""
    base, tuned = weights(place, "base"), weights(place, "tuned")
    command = ("edit", "extract-lora", "tuned", "-b", "base", "--rank", "3", "-o", "out", "-f")
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    assert_done(call(*command, "--embeddings", "base", cwd=place))
    got = loaded(place, "out")
    assert all(torch.equal(got[name], base[name]) for name in ends)

    ran = assert_done(call(*command, "--embeddings", "lora", "--json", cwd=place)).json
    got, residuals = loaded(place, "out"), ran["outputs"][0]["residuals"]
    for name in ends:
        lost = torch.linalg.norm(got[name] - tuned[name]) / torch.linalg.norm(
            tuned[name] - base[name]
        )
        assert residuals[name] == pytest.approx(float(lost), rel=1e-4)


def test_layers_in_full(place: Path) -> None:
    """--whole takes any selector."""
    command = ("edit", "extract-lora", "tuned", "-b", "base", "--rank", "1", "-o", "out", "-f")
    ran = assert_done(call(*command, "--whole", r"layers\.0\.mlp\.down_proj", "--json", cwd=place))
    name = "model.layers.0.mlp.down_proj.weight"
    assert name not in ran.json["outputs"][0]["ranks"]
    assert torch.equal(loaded(place, "out")[name].float(), weights(place, "tuned")[name].float())


def test_convolutions(tmp_path: Path) -> None:
    """Kernels are factored as Kohya's and LyCORIS' convolutions are: A has the kernel."""
    random = torch.Generator().manual_seed(2)
    name = "down.0.conv.weight"
    base = {name: torch.randn(6, 4, 3, 3, generator=random)}
    step = 0.05 * torch.randn(6, 36, generator=random, dtype=torch.float64)
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: base[name] + step.reshape(6, 4, 3, 3).float()}, tmp_path / "t.safetensors")
    command = ("edit", "extract-lora", "t.safetensors", "-b", "base.safetensors", "--rank", "2")
    assert_done(call(*command, "--target", "kohya", "-o", "out.safetensors", cwd=tmp_path))

    held = load_file(tmp_path / "out.safetensors")
    a = held["lora_unet_down_0_conv.lora_down.weight"].double()
    b = held["lora_unet_down_0_conv.lora_up.weight"].double()
    assert (tuple(a.shape), tuple(b.shape)) == ((2, 4, 3, 3), (6, 2, 1, 1))
    assert held["lora_unet_down_0_conv.alpha"] == 2
    U, S, Vh = torch.linalg.svd(step, full_matrices=False)
    best = (U[:, :2] * S[:2]) @ Vh[:2]
    assert torch.linalg.norm(b.reshape(6, 2) @ a.reshape(2, 36) - best) <= 1e-5 * S[0]


def test_tied_embeddings(tmp_path: Path) -> None:
    """PEFT would replace the embedding and leave the head, so the user has to choose."""
    torch.manual_seed(0)
    save(tmp_path, LlamaForCausalLM(_config(tie_word_embeddings=True)))
    command = ("edit", "extract-lora", "tuned", "-b", "base", "--rank", "4", "-o", "out")
    assert_refused(call(*command, cwd=tmp_path), "tied to the head", "--exclude")
    assert_refused(call(*command, "--embeddings", "lora", cwd=tmp_path), "tied to the head")
    assert_done(call(*command, "--embeddings", "base", cwd=tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "add --rank 16"),
        (("--rank", "4", "--embeddings", "bass"), "base"),
        (("--rank", "0"), "rank"),
        (("--energy", "1.5"), "energy"),
        (("--rank", "4", "--whole", "class=conv"), "matches no tensor"),
    ],
)
def test_refusals(place: Path, options: tuple[str, ...], words: str) -> None:
    """One line each, and nothing is written."""
    command = ("edit", "extract-lora", "tuned", "-b", "base", "-o", "never", *options)
    assert_refused(call(*command, cwd=place), words)
    assert not (place / "never").exists()


def test_adapters_are_no_fine_tunes(place: Path) -> None:
    """The error says how to truncate them."""
    command = ("edit", "extract-lora", "tuned", "-b", "base", "--rank", "2", "-o", "small", "-f")
    assert_done(call(*command, cwd=place))
    again = call("edit", "extract-lora", "small", "-b", "base", "--rank", "1", "-o", "x", cwd=place)
    assert_refused(again, "mergebench merge small --as lora -m task_arithmetic --rank 16")
